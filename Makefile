# SPDX-License-Identifier: Apache-2.0
CLANG     ?= clang-19
BPF_FLAGS := -target bpf -mcpu=v3 -O2 -g -Wall -Wextra -Werror -Wno-unused-function -Wno-unused-parameter \
             -I/usr/include/$(shell uname -m)-linux-gnu
BPF_OBJS  := $(patsubst bpf/%.c,bpf/obj/%.o,$(wildcard bpf/*.c))
BPF_DEPS  := $(wildcard bpf/*.h bpf/lib/*.h bpf/include/*.h)

.PHONY: bpf bpf-objects
bpf-objects: $(BPF_OBJS)

bpf/obj/%.o: bpf/%.c $(BPF_DEPS)
	@mkdir -p bpf/obj
	$(CLANG) $(BPF_FLAGS) -c $< -o $@

bpf: bpf-objects
	cd bpf && go run ./gen
