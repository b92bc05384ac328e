// SPDX-License-Identifier: Apache-2.0

// Package cgroup makes, joins, empties and removes one cgroup path in every hierarchy of a machine,
// be it unified (cgroup2 on /sys/fs/cgroup) or hybrid (version 1 hierarchies beside a cgroup2 one).
//
// Membership is the sandbox's memory: every process it starts is in its cgroup from birth, so that
// cleaning up never depends on a file that a crash may have lost.
package cgroup

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"sort"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// Hierarchy is one mounted cgroup file system.
type Hierarchy struct {
	Mount   string // e.g. /sys/fs/cgroup/memory
	Options string // what mounts it again: "memory", "cpu,cpuacct", "none,name=systemd"; empty for cgroup2
	V2      bool
}

// Layout is all hierarchies of the machine, the cgroup2 one first.
type Layout struct {
	Hierarchies []Hierarchy
	Unified     bool // cgroup2 is the only hierarchy
}

// Root is where the cgroup file systems are mounted.
const Root = "/sys/fs/cgroup"

// System is the child of a node's cgroup that holds the node's own daemons on unified hosts, where a
// cgroup with processes of its own cannot hand controllers to its children.
const System = "system"

// Detect reads the machine's layout from /proc/self/mountinfo.
func Detect() (*Layout, error) {
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return parse(f)
}

func parse(mountinfo io.Reader) (*Layout, error) {
	l := &Layout{}
	seen := map[string]bool{}
	s := bufio.NewScanner(mountinfo)
	for s.Scan() {
		pre, post, ok := strings.Cut(s.Text(), " - ")
		f, g := strings.Fields(pre), strings.Fields(post)
		if !ok || len(f) < 6 || len(g) < 3 {
			continue
		}
		mount, kind, super := f[4], g[0], g[2]
		if seen[mount] || (mount != Root && path.Dir(mount) != Root) {
			continue
		}
		switch kind {
		case "cgroup2":
			l.Hierarchies = append([]Hierarchy{{Mount: mount, V2: true}}, l.Hierarchies...)
			l.Unified = mount == Root
		case "cgroup":
			l.Hierarchies = append(l.Hierarchies, Hierarchy{Mount: mount, Options: v1Options(super)})
		default:
			continue
		}
		seen[mount] = true
	}
	if err := s.Err(); err != nil {
		return nil, err
	}
	if len(l.Hierarchies) == 0 || !l.Hierarchies[0].V2 {
		return nil, fmt.Errorf("no cgroup2 file system below %s: mount one, e.g. `mkdir -p %s/unified && mount -t cgroup2 cgroup2 %s/unified`", Root, Root, Root)
	}
	if l.Unified {
		l.Hierarchies = l.Hierarchies[:1]
	}
	return l, nil
}

// v1Options keeps of a super block's options those that name the hierarchy.
func v1Options(super string) string {
	var keep []string
	named := false
	for _, o := range strings.Split(super, ",") {
		switch {
		case strings.HasPrefix(o, "name="):
			named = true
			keep = append(keep, o)
		case o == "rw", o == "ro", o == "xattr", o == "clone_children", o == "cpuset_v2_mode", o == "seclabel", strings.HasPrefix(o, "release_agent"):
		default:
			keep = append(keep, o)
		}
	}
	if named && len(keep) == 1 {
		keep = append([]string{"none"}, keep...)
	}
	return strings.Join(keep, ",")
}

// V2 is the directory of path in the cgroup2 hierarchy.
func (l *Layout) V2(path string) string { return filepath.Join(l.Hierarchies[0].Mount, path) }

// Create makes path in every hierarchy; on unified hosts with all controllers passed down to it.
func (l *Layout) Create(path string) error {
	for _, h := range l.Hierarchies {
		parent, dir := h.Mount, h.Mount
		for _, part := range strings.Split(path, "/") {
			if l.Unified {
				if err := enable(dir); err != nil {
					return err
				}
			}
			dir = filepath.Join(dir, part)
			if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
				return fmt.Errorf("cgroup: %w", err)
			}
			if err := inheritCpuset(parent, dir); err != nil {
				return err
			}
			parent = dir
		}
	}
	return nil
}

// EnableAllAt passes every controller that the cgroup2 directory dir has down to its children.
func (l *Layout) EnableAllAt(dir string) error { return enable(dir) }

func enable(dir string) error {
	have, err := os.ReadFile(filepath.Join(dir, "cgroup.controllers"))
	if err != nil {
		return err
	}
	on, err := os.ReadFile(filepath.Join(dir, "cgroup.subtree_control"))
	if err != nil {
		return err
	}
	enabled := strings.Fields(string(on))
	for _, c := range strings.Fields(string(have)) {
		if contains(enabled, c) {
			continue
		}
		err := os.WriteFile(filepath.Join(dir, "cgroup.subtree_control"), []byte("+"+c), 0)
		if errors.Is(err, syscall.EBUSY) {
			return fmt.Errorf("cgroup %s holds processes, so controller %s cannot be passed to its children: move them into a child (mkdir %s/init; for p in $(cat %s/cgroup.procs); do echo $p > %s/init/cgroup.procs; done)", dir, c, dir, dir, dir)
		}
		if err != nil && contains([]string{"cpu", "memory", "pids"}, c) { // kubelet needs these
			return fmt.Errorf("cgroup: enable %s in %s: %w", c, dir, err)
		}
	}
	return nil
}

func contains(list []string, s string) bool {
	for _, x := range list {
		if x == s {
			return true
		}
	}
	return false
}

// inheritCpuset copies cpus and mems of a version 1 cpuset: a process cannot join one without.
func inheritCpuset(parent, dir string) error {
	for _, f := range []string{"cpuset.cpus", "cpuset.mems"} {
		cur, err := os.ReadFile(filepath.Join(dir, f))
		if errors.Is(err, fs.ErrNotExist) || len(strings.TrimSpace(string(cur))) > 0 {
			continue
		}
		if err != nil {
			return err
		}
		if _, err := os.Stat(filepath.Join(dir, "cgroup.controllers")); err == nil {
			continue // cgroup2: empty means "as the parent"
		}
		v, err := os.ReadFile(filepath.Join(parent, f))
		if err != nil {
			return err
		}
		if err := os.WriteFile(filepath.Join(dir, f), v, 0); err != nil {
			return fmt.Errorf("cgroup: %w", err)
		}
	}
	return nil
}

// Join moves the calling process into path in every hierarchy.
func (l *Layout) Join(path string) error {
	for _, h := range l.Hierarchies {
		if err := os.WriteFile(filepath.Join(h.Mount, path, "cgroup.procs"), []byte("0"), 0); err != nil {
			return fmt.Errorf("join cgroup: %w", err)
		}
	}
	return nil
}

// Exists says whether any hierarchy has path.
func (l *Layout) Exists(path string) bool {
	for _, h := range l.Hierarchies {
		if _, err := os.Stat(filepath.Join(h.Mount, path)); err == nil {
			return true
		}
	}
	return false
}

// Pids lists the processes in path and below, in any hierarchy.
func (l *Layout) Pids(path string) []int {
	set := map[int]bool{}
	for _, h := range l.Hierarchies {
		_ = filepath.WalkDir(filepath.Join(h.Mount, path), func(p string, d fs.DirEntry, err error) error {
			if err != nil || !d.IsDir() {
				return nil // a cgroup may vanish while we look
			}
			b, _ := os.ReadFile(filepath.Join(p, "cgroup.procs"))
			for _, f := range strings.Fields(string(b)) {
				if pid, err := strconv.Atoi(f); err == nil && pid > 0 {
					set[pid] = true
				}
			}
			return nil
		})
	}
	pids := make([]int, 0, len(set))
	for p := range set {
		pids = append(pids, p)
	}
	sort.Ints(pids)
	return pids
}

// Kill ends every process in path and below with SIGKILL and returns when they are gone.
func (l *Layout) Kill(ctx context.Context, path string) error {
	killFile := filepath.Join(l.V2(path), "cgroup.kill")
	for {
		_ = os.WriteFile(killFile, []byte("1"), 0) // Linux 5.14; the loop below does the same slowly
		pids := l.Pids(path)
		left := 0
		for _, p := range pids {
			if p == os.Getpid() {
				continue
			}
			left++
			_ = syscall.Kill(p, syscall.SIGKILL)
		}
		if left == 0 {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("processes %v in cgroup %s do not die", pids, path)
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// Remove removes path and everything below it in every hierarchy; its processes must be gone.
func (l *Layout) Remove(ctx context.Context, path string) error {
	for {
		var last error
		for _, h := range l.Hierarchies {
			if err := removeTree(filepath.Join(h.Mount, path)); err != nil {
				last = err
			}
		}
		if last == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("remove cgroup: %w", last)
		case <-time.After(10 * time.Millisecond):
		}
	}
}

func removeTree(dir string) error {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	for _, e := range entries {
		if e.IsDir() {
			if err := removeTree(filepath.Join(dir, e.Name())); err != nil {
				return err
			}
		}
	}
	if err := syscall.Rmdir(dir); err != nil && err != syscall.ENOENT {
		return &fs.PathError{Op: "rmdir", Path: dir, Err: err}
	}
	return nil
}

// Favoured is how many times a cgroup's default share of the CPU Favour gives.
const Favoured = 100

// Favour lets path, which must exist, have the CPU before its siblings, until undo is called. It has no effect while the
// CPU is not short.
func (l *Layout) Favour(path string) (undo func() error, err error) {
	file, share := l.cpuShare(path)
	if file == "" {
		return nil, errors.New("no cgroup hierarchy of this machine has the CPU's controller: the sandbox cannot be favoured")
	}
	before, err := os.ReadFile(file)
	if err != nil {
		return nil, fmt.Errorf("favour cgroup: %w", err)
	}
	if err := os.WriteFile(file, []byte(strconv.Itoa(share)), 0); err != nil {
		return nil, fmt.Errorf("favour cgroup: %w", err)
	}
	return func() error {
		err := os.WriteFile(file, bytes.TrimSpace(before), 0)
		if errors.Is(err, fs.ErrNotExist) {
			err = nil // the cgroup is gone
		}
		return err
	}, nil
}

// cpuShare is the file with path's share of the CPU, and what to write to favour it; empty if there is none.
func (l *Layout) cpuShare(path string) (file string, share int) {
	for _, h := range l.Hierarchies {
		switch {
		case h.V2 && l.Unified:
			return filepath.Join(h.Mount, path, "cpu.weight"), Favoured * 100
		case contains(strings.Split(h.Options, ","), "cpu"):
			return filepath.Join(h.Mount, path, "cpu.shares"), Favoured * 1024
		}
	}
	return "", 0
}

// RemoveIfEmpty removes path where it has no children and no processes.
func (l *Layout) RemoveIfEmpty(path string) {
	for _, h := range l.Hierarchies {
		_ = syscall.Rmdir(filepath.Join(h.Mount, path))
	}
}
