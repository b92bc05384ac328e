// SPDX-License-Identifier: Apache-2.0

// Package config owns the configuration of a Lash node and of the operator: one struct, one key a field, one
// document (the ConfigMap lash-config) for both programs.
//
// It reads a directory with one file a key (a mounted ConfigMap) and flags of the form --key=value; flags win. It
// writes nothing. What must hold:
//
//   - a value that is in force is one that was checked: Load returns either a valid Config or an error that names
//     every wrong key, its value, where it came from and what to do about it;
//   - no key is silently ignored: an unknown one is refused with the nearest known name, one that belongs to a
//     feature this version lacks is accepted only while it leaves that feature off;
//   - old spellings keep working and are reported (Notes), so that a user learns the present name.
//
// The reference in docs/reference/configuration.md is generated from the struct: go generate ./internal/config.
package config

//go:generate go test -count=1 -run TestReferenceIsCurrent -update .
