// SPDX-License-Identifier: Apache-2.0

// Package state owns the tables that hold everything a node knows: one file a table, with its columns, its indexes and
// how a row prints. Whoever learns a fact writes a row; stages turn rows into rows ([Stage]); loops make the kernel equal
// to rows ([DesiredOf]). Rows are values that nobody changes after inserting them.
//
// Both compute everything anew after a change, which is simplest, and fine for what is as big as a node. What is as big
// as the cluster is a [Keyed]: its rows are computed one by one, those that a change can have changed. A row's function
// may read only tables that are sources, and of those only what the source says it touches: tests compare, after random
// changes of each source, with what is computed at once.
package state
