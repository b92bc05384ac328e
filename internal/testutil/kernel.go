// SPDX-License-Identifier: Apache-2.0

package testutil

import (
	"fmt"
	"testing"

	"golang.org/x/sys/unix"
)

// KernelAtLeast tells whether the running kernel is of that version or a later one.
func KernelAtLeast(t testing.TB, major, minor int) bool {
	t.Helper()
	var uts unix.Utsname
	var x, y int
	if err := unix.Uname(&uts); err != nil {
		t.Fatal(err)
	}
	if _, err := fmt.Sscanf(unix.ByteSliceToString(uts.Release[:]), "%d.%d", &x, &y); err != nil {
		t.Fatal(err)
	}
	return x > major || x == major && y >= minor
}
