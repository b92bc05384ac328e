// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/lash-net/lash/sandbox/cgroup"
	"github.com/lash-net/lash/sandbox/cluster"
)

const testName = "itest"

// program builds the program; a test binary cannot start itself as a node.
func program(t *testing.T) string {
	t.Helper()
	if os.Getenv("LASH_SANDBOX_TEST") == "" {
		t.Skip("starts real clusters and builds Kubernetes if it is not cached: set LASH_SANDBOX_TEST=1")
	}
	if os.Getuid() != 0 {
		t.Skip("needs root: makes namespaces and cgroups")
	}
	bin := filepath.Join(t.TempDir(), "sandbox")
	if out, err := exec.Command("go", "build", "-o", bin, ".").CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	t.Cleanup(func() {
		_ = exec.Command(bin, "down", "--name", testName).Run()
		nothingLeft(t)
	})
	return bin
}

// nothingLeft looks by itself, not through the program: namespaces, cgroups, mounts, files, processes.
func nothingLeft(t *testing.T) {
	t.Helper()
	if m, _ := filepath.Glob("/run/netns/sb-" + testName + "-*"); len(m) > 0 {
		t.Errorf("left: %v", m)
	}
	for _, p := range []string{"/var/lib/lash-sandbox/" + testName, "/sys/fs/cgroup/lash-sandbox/" + testName} {
		if _, err := os.Stat(p); err == nil {
			t.Errorf("left: %s", p)
		}
	}
	if m, _ := filepath.Glob("/sys/fs/cgroup/*/lash-sandbox/" + testName); len(m) > 0 {
		t.Errorf("left: %v", m)
	}
	if b, err := os.ReadFile("/proc/self/mountinfo"); err != nil || strings.Contains(string(b), "lash-sandbox/"+testName) {
		t.Errorf("left: mounts (%v)", err)
	}
	cmdlines, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, f := range cmdlines {
		if b, err := os.ReadFile(f); err == nil && bytes.Contains(b, []byte("lash-sandbox/"+testName)) {
			t.Errorf("left: %s: %s", f, bytes.ReplaceAll(b, []byte{0}, []byte{' '}))
		}
	}
}

func run(t *testing.T, bin string, args ...string) (string, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	args = append([]string{args[0], "--name", testName}, args[1:]...)
	out, err := exec.CommandContext(ctx, bin, args...).CombinedOutput()
	return string(out), err
}

func must(t *testing.T, bin string, args ...string) string {
	t.Helper()
	out, err := run(t, bin, args...)
	if err != nil {
		t.Fatalf("sandbox %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return out
}

func TestClusterLivesThroughFailuresAndLeavesNothing(t *testing.T) {
	bin := program(t)
	must(t, bin, "up", "--nodes", "2", "--cni", "bridge", "--proxy", "iptables")
	if out, err := run(t, bin, "up"); err == nil || !strings.Contains(out, "already up") {
		t.Errorf("second up: %v\n%s", err, out)
	}
	if out := must(t, bin, "exec", "n2", "--", "hostname"); strings.TrimSpace(out) != "n2" {
		t.Errorf("hostname of n2 is %q", out)
	}
	if out, err := run(t, bin, "exec", "n1", "--", "sh", "-c", "exit 7"); err == nil || err.(*exec.ExitError).ExitCode() != 7 {
		t.Errorf("exit status is lost: %v\n%s", err, out)
	}
	must(t, bin, "kill", "n1")
	if out, err := run(t, bin, "exec", "n1", "--", "true"); err == nil || !strings.Contains(out, "restart") {
		t.Errorf("a killed node: %v\n%s", err, out)
	}
	must(t, bin, "restart", "--all")
	must(t, bin, "stop", "apiserver")
	var s cluster.Status
	if err := json.Unmarshal([]byte(must(t, bin, "status", "-o", "json")), &s); err != nil || s.Ready || len(s.Machines) != 2 {
		t.Errorf("status without an API server: %+v %v", s, err)
	}
	must(t, bin, "start", "apiserver")
	if out := must(t, bin, "add-node"); !strings.Contains(out, "n3") {
		t.Errorf("add-node: %s", out)
	}
	must(t, bin, "remove-node", "n1")
	if out := must(t, bin, "kubectl", "get", "nodes", "-o", "name"); strings.TrimSpace(out) != "node/n2\nnode/n3" {
		t.Errorf("nodes: %s", out)
	}
	must(t, bin, "down")
	nothingLeft(t)
}

func TestTwoUpsAtOnceAreOneAndAClearError(t *testing.T) {
	bin := program(t)
	outs, errs := make([]string, 2), make([]error, 2)
	var wg sync.WaitGroup
	for i := range outs {
		wg.Go(func() { outs[i], errs[i] = run(t, bin, "up", "--nodes", "1") })
	}
	wg.Wait()
	if errs[0] == nil {
		outs[0], errs[0], outs[1], errs[1] = outs[1], errs[1], outs[0], errs[0]
	}
	if errs[1] != nil || errs[0] == nil || !strings.Contains(outs[0], "another sandbox command is at work") {
		t.Errorf("one: %v\n%s\nthe other: %v\n%s", errs[0], outs[0], errs[1], outs[1])
	}
	must(t, bin, "down")
	nothingLeft(t)
}

func TestDownCleansWhateverAKilledUpLeft(t *testing.T) {
	bin := program(t)
	layout, err := cgroup.Detect()
	if err != nil {
		t.Fatal(err)
	}
	// killed when so many processes run: with the first of the control plane, with nodes, with pods' daemons
	for _, procs := range []int{1, 5, 12} {
		cmd := exec.Command(bin, "up", "--name", testName, "--nodes", "2")
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		deadline := time.Now().Add(60 * time.Second)
		for len(layout.Pids("lash-sandbox/"+testName)) < procs && time.Now().Before(deadline) {
			time.Sleep(time.Millisecond)
		}
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		must(t, bin, "down")
		nothingLeft(t)
	}
}

func TestInterruptedUpCleansItself(t *testing.T) {
	bin := program(t)
	cmd := exec.Command(bin, "up", "--name", testName, "--nodes", "1")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	deadline := time.Now().Add(60 * time.Second)
	for time.Now().Before(deadline) {
		if _, err := os.Stat("/run/netns/sb-" + testName + "-n1"); err == nil {
			break
		}
		time.Sleep(time.Millisecond)
	}
	if err := cmd.Process.Signal(os.Interrupt); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err == nil {
		t.Error("an interrupted up succeeded")
	}
	nothingLeft(t)
}
