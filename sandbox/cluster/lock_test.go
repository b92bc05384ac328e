// SPDX-License-Identifier: Apache-2.0

package cluster

import (
	"errors"
	"os"
	"path/filepath"
	"testing"
)

func TestOnlyOneCommandHasASandbox(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "it")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	a, b := &Cluster{Config: Config{Name: "it"}, Dir: dir}, &Cluster{Config: Config{Name: "it"}, Dir: dir}
	if err := a.TryLock(); err != nil {
		t.Fatal(err)
	}
	if err := b.TryLock(); !errors.Is(err, ErrBusy) {
		t.Errorf("second lock: %v", err)
	}
	// a Down of somebody without the lock, and the Up that follows it: the lock is that of the new directory
	if err := errors.Join(os.Remove(dir), os.Mkdir(dir, 0o755)); err != nil {
		t.Fatal(err)
	}
	if err := b.TryLock(); err != nil {
		t.Errorf("lock of the new directory: %v", err)
	}
	a.Unlock()
	b.Unlock()
	if err := a.TryLock(); err != nil {
		t.Errorf("after Unlock: %v", err)
	}
	a.Unlock()
	if err := os.Remove(dir); err != nil {
		t.Fatal(err)
	}
	if err := a.TryLock(); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("lock of nothing: %v", err)
	}
}
