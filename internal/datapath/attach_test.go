// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"os"
	"path/filepath"
	"slices"
	"testing"
)

func TestLinksOfAnotherVersionAreTakenAway(t *testing.T) {
	d := &Datapath{cfg: Config{Root: t.TempDir()}}
	if err := os.Mkdir(d.linkDir(), 0o755); err != nil {
		t.Fatal(err)
	}
	for _, pin := range []string{"eth0-from_netdev", "eth0-to_netdev", "eth0-of_before", "eth0-1-of_before", "eth01-of_before", "cgroup-connect4"} {
		if err := os.WriteFile(filepath.Join(d.linkDir(), pin), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for range 2 {
		if err := d.unpinOthers("eth0", deviceHooks); err != nil {
			t.Fatal(err)
		}
	}
	entries, err := os.ReadDir(d.linkDir())
	if err != nil {
		t.Fatal(err)
	}
	var left []string
	for _, e := range entries {
		left = append(left, e.Name())
	}
	want := []string{"cgroup-connect4", "eth0-1-of_before", "eth0-from_netdev", "eth0-to_netdev", "eth01-of_before"}
	if !slices.Equal(left, want) {
		t.Errorf("left %v, want %v", left, want)
	}
}
