# SPDX-License-Identifier: Apache-2.0
#
# Two commands do everything on a fresh Debian 12, as root:
#   make demo    a three-node Kubernetes on this machine, with Lash, checked
#   make test    all test layers (make check: the quick one, without root)

SHELL     := /bin/bash
VERSION   ?= dev
CLANG     ?= clang-19
BPF_FLAGS := -target bpf -mcpu=v3 -O2 -g -Wall -Wextra -Werror -Wno-unused-function -Wno-unused-parameter \
             -I/usr/include/$(shell uname -m)-linux-gnu
BPF_OBJS  := $(patsubst bpf/%.c,bpf/obj/%.o,$(wildcard bpf/*.c))
BPF_DEPS  := $(wildcard bpf/*.h bpf/lib/*.h bpf/include/*.h)
GO_BUILD  := CGO_ENABLED=0 go build -trimpath -ldflags "-s -w -X github.com/lash-net/lash/internal/version.Version=$(VERSION)"
SAY       := @printf '\n==> %s\n'

.PHONY: help deps bpf bpf-objects build image lint unit check packet fuzz shared-ports netns e2e test conformance demo demo-services demo-down test-kernels bench bench-control bench-services bench-identities clean

help: ## what there is
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'

deps: ## install what building and testing needs (Debian packages; asks nothing when all is there)
	@hack/deps.sh

$(BPF_OBJS): bpf/obj/%.o: bpf/%.c $(BPF_DEPS) | deps
	@mkdir -p bpf/obj
	$(CLANG) $(BPF_FLAGS) -c $< -o $@

bpf-objects: $(BPF_OBJS)

bpf: bpf-objects ## compile the datapath and generate its Go types
	cd bpf && go run ./gen

build: bpf ## the binaries, in bin/
	$(GO_BUILD) -o bin/ ./cmd/...
	cd sandbox && CGO_ENABLED=0 go build -trimpath -o ../bin/sandbox .

image: build ## the image, dist/lash.oci.tar
	go run ./hack/image -version $(VERSION) -out dist/lash.oci.tar bin/lash-agent bin/lash-operator bin/lash-cni bin/lash

lint: bpf
	$(SAY) 'lint: formatting, vet, generated files'
	@out=$$(gofmt -l $$(git ls-files '*.go')); [ -z "$$out" ] || { echo "not formatted: $$out"; exit 1; }
	go vet ./...
	cd sandbox && go vet ./...
	@git diff --exit-code --stat -- bpf/types_gen.go || { echo "bpf/types_gen.go is not current: commit what make bpf wrote"; exit 1; }

unit: bpf
	$(SAY) 'unit: pure stages and programs, -race'
	go test -race -shuffle=on -count=1 ./api/... ./bpf/... ./cmd/lash-agent ./cmd/lash-cni $$(go list ./internal/... | grep -v internal/cli)
	go test -count=1 ./cmd/lash ./cmd/lash-operator ./internal/cli ./hack/... ./deploy/... ./test/vm
	cd sandbox && go test -count=1 ./...

check: lint unit ## the quick layer

packet: bpf
	$(SAY) 'packet: every tc and XDP program on single packets (BPF_PROG_TEST_RUN), and the fuzzers on their seeds'
	go test -count=1 ./test/packet

FUZZTIME ?= 1m
fuzz: bpf ## the fuzzers of the C packet parsers, each for FUZZTIME (1m), as root
	@for f in FuzzFromContainer FuzzFromNetdev FuzzFromHost FuzzToNetdev FuzzFromOverlay FuzzXDPEntry; do \
		printf '\n==> fuzz: %s, %s\n' $$f $(FUZZTIME); \
		go test ./test/packet -run '^$$' -fuzz "^$$f\$$" -fuzztime $(FUZZTIME) || exit 1; \
	done

SHAREDTIME ?= 10m
shared-ports: bpf ## pods, NodePorts and the node's sockets on the same source ports at random for SHAREDTIME (10m), as root
	go test -count=1 -timeout 0 ./test/netns -run '^TestPortsAreShared$$' -v -shared-ports $(SHAREDTIME)

netns: bpf
	$(SAY) 'netns: the datapath with real traffic in network namespaces'
	go test -count=1 -timeout 40m -v -run . ./test/netns | grep -vE '^ *(=== RUN|cluster_test)'; exit $${PIPESTATUS[0]}

e2e: image
	$(SAY) 'e2e: three nodes of real Kubernetes; natively routed, then by the tunnel: resilience, changes of mode'
	bin/sandbox down --name e2e
	trap 'bin/sandbox down --name e2e' EXIT; \
	bin/sandbox demo --name e2e --mode native && bin/sandbox demo --name e2e --mode vxlan --resilience --switch

test: lint unit packet netns e2e ## every layer
	$(SAY) 'all layers passed'

MODE ?= vxlan
demo: image ## a three-node cluster on Lash, checked and left running; MODE=native without tunnel
	bin/sandbox demo --mode $(MODE)

conformance: image ## the upstream Kubernetes e2e suite's network specs on six nodes without kube-proxy; MODE=native without tunnel
	bin/sandbox conformance --name conformance --mode $(MODE) $(CONFORMANCE)

SET ?=
demo-services: image ## the demo, then services under 2,000 requests a second: rolling restarts, XDP, agents killed, absent, upgraded (eight minutes); SET="loadBalancer.mode=dsr" sets chart values
	trap 'bin/sandbox down --name services' EXIT; \
	bin/sandbox demo --name services --mode $(MODE) $(addprefix --set ,$(SET)) --services

demo-down: ## take it down; nothing is left
	bin/sandbox down

KERNELS        ?= 6.1,6.12
KERNEL_TESTS   ?= ./test/vm/features ./test/packet ./test/netns ./internal/datapath/...
test-kernels: bpf ## the namespace tests on Debian's 6.1 and 6.12 kernels, in qemu
	$(SAY) 'kernels: $(KERNELS)'
	CGO_ENABLED=0 go run ./test/vm -kernel $(KERNELS) -timeout 60m $(addprefix -pkg ,$(KERNEL_TESTS))

bench: bpf ## Lash against the bare namespaces, in one run, with gates; BENCH="-rounds 20" adds flags
	go run ./test/bench $(BENCH)

bench-control: bpf ## CNI ADD of 100 pods, the agent's start and memory
	$(GO_BUILD) -o bin/ ./cmd/lash-agent ./cmd/lash-cni
	go run ./test/bench/control $(BENCH)

bench-services: bpf ## 10,000 services with 10 endpoints each into the agent's tables and maps; BENCH="-services 1000 -maglev" adds flags
	go run ./test/bench/services $(BENCH)

bench-identities: bpf ## 10,000 pods with 2,000 sets of labels through a real API server, three agents; BENCH="-rate 50" adds flags
	$(GO_BUILD) -o bin/ ./cmd/lash-agent ./cmd/lash-cni ./cmd/lash-operator
	go run ./test/bench/identities $(BENCH)

clean:
	rm -rf bin dist bpf/obj
