// SPDX-License-Identifier: Apache-2.0

// Package state owns the tables that hold everything a node knows: one file a table, with its columns, its indexes and
// how a row prints. Whoever learns a fact writes a row; stages turn rows into rows (Derive); loops make the kernel equal
// to rows (Desired). Rows are values that nobody changes after inserting them.
package state
