// SPDX-License-Identifier: Apache-2.0

// Package bpf is the datapath's C and what Go knows of it: the compiled objects,
// embedded, and the structures, constants and names generated from their BTF.
// It owns no state and touches no kernel; internal/datapath does.
package bpf

//go:generate sh -c "cd .. && make -s bpf-objects"
//go:generate go run ./gen
