// SPDX-License-Identifier: Apache-2.0

// Package datapath puts the programs of package bpf into the kernel: it specialises and
// loads the objects, pins maps, programs and links below bpf-root, attaches programs to devices and
// to the node's cgroup, turns rows of the tables into rows of maps, and removes
// connections that have expired. Translations (snat.go) it shares with running programs: it
// removes them under the lock that they use, and changes lash_snat_ports by compare and swap.
//
// What it leaves behind forwards packets without it. It reads nothing but the kernel, and
// everything it creates is recognisable: a pin below bpf-root, or a name in bpf.Programs.
package datapath
