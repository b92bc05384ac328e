// SPDX-License-Identifier: Apache-2.0

package proc

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

func TestAnEndedOrReusedPidIsNotAlive(t *testing.T) {
	cmd := exec.Command("sleep", "1000")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	r, err := Of(cmd.Process.Pid)
	if err != nil || !r.Alive() {
		t.Fatalf("%+v %v", r, err)
	}
	file := filepath.Join(t.TempDir(), "pid")
	if err := r.Write(file); err != nil || Read(file) != r {
		t.Errorf("read back %+v, %v", Read(file), err)
	}
	if (Ref{r.Pid, r.Start + 1}).Alive() {
		t.Error("a later process with the same pid was taken for ours")
	}
	r.Kill()
	_ = cmd.Wait()
	if r.Alive() {
		t.Error("alive after its end")
	}
	if Read(filepath.Join(t.TempDir(), "none")).Alive() || (Ref{}).Alive() {
		t.Error("nothing is alive")
	}
	if err := os.WriteFile(file, []byte("12"), 0o644); err != nil || Read(file) != (Ref{}) {
		t.Error("a damaged file gave a process")
	}
}
