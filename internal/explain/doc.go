// SPDX-License-Identifier: Apache-2.0

// Package explain tells what becomes of a packet before it is sent (`lash explain`).
//
// A way through the cluster is made of hops, one a node: Hop runs the node's own programs on the packet in a dry run
// (datapath.DryRun), follows what they decide through the node's stack and on to the next program, and ends with a verdict
// or with the node that is next, whose agent is asked for its hop (Peers). Way begins where names become addresses.
//
// It owns nothing and writes nothing: it reads the tables for the names of things, the live maps for the rows behind a
// decision, and the kernel's routing table for what the stack will do. What decided is the program's own word (its
// verdict, the reasons it counted, its events); the rows are looked up again beside it, for a person.
package explain
