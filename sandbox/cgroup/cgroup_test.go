// SPDX-License-Identifier: Apache-2.0

package cgroup

import (
	"context"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

const hybrid = `31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,relatime shared:9 - cgroup cgroup rw,cpu,cpuacct
35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory
40 31 0:37 / /sys/fs/cgroup/systemd rw,relatime - cgroup cgroup rw,xattr,name=systemd
41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw
50 31 0:38 / /somewhere/else rw,relatime - cgroup2 cgroup2 rw
`

func TestHybridLayout(t *testing.T) {
	l, err := parse(strings.NewReader(hybrid))
	if err != nil {
		t.Fatal(err)
	}
	want := []Hierarchy{
		{Mount: "/sys/fs/cgroup/unified", V2: true},
		{Mount: "/sys/fs/cgroup/cpu,cpuacct", Options: "cpu,cpuacct"},
		{Mount: "/sys/fs/cgroup/memory", Options: "memory"},
		{Mount: "/sys/fs/cgroup/systemd", Options: "none,name=systemd"},
	}
	if l.Unified || len(l.Hierarchies) != len(want) {
		t.Fatalf("got %+v", l)
	}
	for i, h := range l.Hierarchies {
		if h != want[i] {
			t.Errorf("hierarchy %d: got %+v, want %+v", i, h, want[i])
		}
	}
	if got := l.V2("a/b"); got != "/sys/fs/cgroup/unified/a/b" {
		t.Errorf("V2: %s", got)
	}
}

func TestUnifiedLayout(t *testing.T) {
	l, err := parse(strings.NewReader("31 23 0:28 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"))
	if err != nil {
		t.Fatal(err)
	}
	if !l.Unified || len(l.Hierarchies) != 1 || l.V2("x") != "/sys/fs/cgroup/x" {
		t.Errorf("got %+v", l)
	}
}

func TestNoCgroup2SaysHowToMountIt(t *testing.T) {
	_, err := parse(strings.NewReader("35 31 0:32 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"))
	if err == nil || !strings.Contains(err.Error(), "mount -t cgroup2") {
		t.Errorf("got %v", err)
	}
}

func TestKillAndRemoveTakeWholeTree(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root: makes cgroups")
	}
	l, err := Detect()
	if err != nil {
		t.Skipf("this machine's cgroups cannot be used: %v", err)
	}
	const top = "lash-sandbox-test"
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	for _, p := range []string{top + "/a", top + "/b/c"} {
		if err := l.Create(p); err != nil {
			t.Skipf("cgroups are not ours to make here: %v", err)
		}
	}
	defer l.Remove(ctx, top)
	fd, err := os.Open(l.V2(top + "/b/c"))
	if err != nil {
		t.Fatal(err)
	}
	defer fd.Close()
	cmd := exec.Command("sleep", "1000")
	cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(fd.Fd())}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	exited := make(chan error, 1)
	go func() { exited <- cmd.Wait() }()
	if pids := l.Pids(top); len(pids) != 1 || pids[0] != cmd.Process.Pid {
		t.Errorf("pids %v, want %d", pids, cmd.Process.Pid)
	}
	if err := l.Kill(ctx, top); err != nil {
		t.Fatal(err)
	}
	if err := <-exited; err == nil {
		t.Error("the process ended by itself")
	}
	if err := l.Remove(ctx, top); err != nil {
		t.Fatal(err)
	}
	if l.Exists(top) {
		t.Error("still there")
	}
}

func TestFavourIsUndone(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root: makes cgroups")
	}
	l, err := Detect()
	if err != nil {
		t.Skipf("this machine's cgroups cannot be used: %v", err)
	}
	const top = "lash-sandbox-favour"
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	if err := l.Create(top); err != nil {
		t.Skipf("cgroups are not ours to make here: %v", err)
	}
	defer l.Remove(ctx, top)
	file, share := l.cpuShare(top)
	if file == "" {
		t.Skip("this machine has no controller of the CPU")
	}
	read := func() string {
		b, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		return strings.TrimSpace(string(b))
	}
	before := read()
	undo, err := l.Favour(top)
	if err != nil {
		t.Fatal(err)
	}
	if got := read(); got != strconv.Itoa(share) {
		t.Errorf("the share is %s, want %d", got, share)
	}
	if err := undo(); err != nil {
		t.Fatal(err)
	}
	if got := read(); got != before {
		t.Errorf("the share is %s, was %s before", got, before)
	}
	if err := l.Remove(ctx, top); err != nil {
		t.Fatal(err)
	}
	if err := undo(); err != nil {
		t.Errorf("of a cgroup that is gone: %v", err)
	}
}
