// SPDX-License-Identifier: Apache-2.0

// Package version knows which Lash this is. The Makefile sets both values when it links.
package version

import (
	"fmt"
	"runtime"
)

var (
	// Version is the release, like 0.1.0, or dev.
	Version = "dev"
	// Commit is the abbreviated commit the program was built from; empty if unknown.
	Commit = ""
)

// Long returns version, commit, and what the program was built for.
func Long() string {
	s := Version
	if Commit != "" {
		s += " (" + Commit + ")"
	}
	return fmt.Sprintf("%s %s %s/%s", s, runtime.Version(), runtime.GOOS, runtime.GOARCH)
}
