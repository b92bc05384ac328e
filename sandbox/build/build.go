// SPDX-License-Identifier: Apache-2.0

// Package build makes the programs that a sandbox runs, once, from their Go modules: Kubernetes, etcd,
// CoreDNS, the small programs of the test image, and, for conformance, the e2e suite. It owns DIR/bin and DIR/src of the cache, keyed by
// version, so that a new version never meets an old binary.
package build

import (
	"context"
	"crypto/sha256"
	"embed"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"
)

// Versions of what is built. go.mod.txt and go.sum.txt below src/ pin everything else.
const (
	Kubernetes = "v1.34.4"
	Etcd       = "v3.6.5"
	CoreDNS    = "v1.12.4"
)

//go:embed src
var sources embed.FS

// Cache is the directory that keeps what was built, e.g. /var/cache/lash-sandbox.
type Cache string

// Set is a group of programs that are needed together.
type Set int

// Sets of programs.
const (
	Cluster     Set = iota // what every sandbox runs
	Conformance            // the Kubernetes e2e suite and the programs of its images
)

type program struct {
	set                        Set
	name, source, pkg, version string
	seconds                    int // CPU seconds when nothing is cached, for the progress line
}

func programs() []program {
	local := hash("src/toolbox/*.go", "src/pause/*.go")
	k := func(name string, s int) program {
		return program{Cluster, name, "k8s", "k8s.io/kubernetes/cmd/" + name, Kubernetes, s}
	}
	e2e := func(name, pkg string, s int) program {
		return program{Conformance, name, "k8s", pkg, Kubernetes, s}
	}
	return []program{
		{Cluster, "pause", "pause", ".", local, 3},
		{Cluster, "toolbox", "toolbox", ".", local, 10},
		{Cluster, "etcd", "etcd", ".", Etcd, 60},
		k("kube-apiserver", 300), k("kubelet", 70), k("kube-controller-manager", 40),
		k("kube-scheduler", 10), k("kubectl", 35), k("kube-proxy", 10),
		{Cluster, "coredns", "coredns", ".", CoreDNS, 60},
		e2e(E2E, "k8s.io/kubernetes/test/e2e", 140),
		e2e("ginkgo", "github.com/onsi/ginkgo/v2/ginkgo", 15),
		e2e("agnhost", "k8s.io/kubernetes/test/images/agnhost", 20),
		e2e("regression-issue-74839", "k8s.io/kubernetes/test/images/regression-issue-74839", 3),
	}
}

// E2E is the Kubernetes e2e suite: a test binary, compiled by `go test`.
const E2E = "e2e.test"

// hash is a version made of the sources themselves, without their tests.
func hash(patterns ...string) string {
	h := sha256.New()
	for _, p := range patterns {
		files, _ := fs.Glob(sources, p) // the patterns are well-formed
		for _, f := range files {
			b, err := sources.ReadFile(f)
			if err != nil {
				panic(err) // embedded at build time
			}
			if !strings.HasSuffix(f, "_test.go") {
				h.Write(b)
			}
		}
	}
	return hex.EncodeToString(h.Sum(nil))[:12]
}

// Bin is the path of a program, built or not.
func (c Cache) Bin(name string) string {
	for _, p := range programs() {
		if p.name == name {
			return c.path(p)
		}
	}
	panic("unknown program " + name)
}

func (c Cache) path(p program) string {
	return filepath.Join(string(c), "bin", p.source+"-"+p.version, p.name)
}

// src is where a program's sources are unpacked: each version has its own directory, so that no file of another one is
// compiled with it.
func (c Cache) src(p program) string {
	return filepath.Join(string(c), "src", p.source+"-"+p.version)
}

// Missing lists the programs of a set that are not built yet.
func (c Cache) Missing(set Set) []string {
	var names []string
	for _, p := range c.missing(set) {
		names = append(names, p.name)
	}
	return names
}

func (c Cache) missing(set Set) []program {
	return slices.DeleteFunc(programs(), func(p program) bool {
		_, err := os.Stat(c.path(p))
		return p.set != set || err == nil
	})
}

// Ensure builds what is missing of a set; say gets one line before and after each program. Two calls at once,
// from any process, build everything once. An interrupted build leaves no program behind and goes on
// from Go's own build cache the next time.
func (c Cache) Ensure(ctx context.Context, set Set, say func(format string, args ...any)) error {
	if len(c.missing(set)) == 0 {
		return nil
	}
	if _, err := exec.LookPath("go"); err != nil {
		return errors.New("the go command is not in PATH: Kubernetes is built from its Go modules; install Go 1.26 or later and put it in PATH")
	}
	unlock, err := c.lock(ctx, say)
	if err != nil {
		return err
	}
	defer unlock()
	missing := c.missing(set)
	for i, p := range missing {
		say("building %s %s (%d to go; up to %d s of CPU time the first time)", p.name, p.version, len(missing)-i, p.seconds)
		start := time.Now()
		if err := c.one(ctx, p); err != nil {
			return err
		}
		if st, err := os.Stat(c.path(p)); err == nil {
			say("built %s in %.0f s, %d MiB", p.name, time.Since(start).Seconds(), st.Size()>>20)
		}
	}
	return nil
}

func (c Cache) lock(ctx context.Context, say func(string, ...any)) (func(), error) {
	if err := os.MkdirAll(string(c), 0o755); err != nil {
		return nil, err
	}
	f, err := os.OpenFile(filepath.Join(string(c), "build.lock"), os.O_CREATE|os.O_RDWR|syscall.O_CLOEXEC, 0o644)
	if err != nil {
		return nil, err
	}
	told := false
	for {
		err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
		if err == nil {
			return func() { f.Close() }, nil
		}
		if !errors.Is(err, syscall.EWOULDBLOCK) {
			f.Close()
			return nil, fmt.Errorf("lock %s: %w", f.Name(), err)
		}
		if !told {
			say("waiting for another build to end (%s)", f.Name())
			told = true
		}
		select {
		case <-ctx.Done():
			f.Close()
			return nil, ctx.Err()
		case <-time.After(200 * time.Millisecond):
		}
	}
}

func (c Cache) one(ctx context.Context, p program) error {
	src := c.src(p)
	if err := unpack(p.source, src); err != nil {
		return fmt.Errorf("build %s: %w", p.name, err)
	}
	out := c.path(p)
	if err := os.MkdirAll(filepath.Dir(out), 0o755); err != nil {
		return err
	}
	tmp := out + ".new"
	defer os.Remove(tmp)
	compile := []string{"-n", "10", "go", "build"}
	if p.name == E2E {
		compile = []string{"-n", "10", "go", "test", "-c"}
	}
	cmd := exec.CommandContext(ctx, "nice", append(compile, "-ldflags", ldflags(p), "-o", tmp, p.pkg)...)
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGTERM) }
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Dir = src
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=-trimpath -buildvcs=false -mod=mod", "GOWORK=off", "GOOS=linux")
	var stderr strings.Builder
	cmd.Stderr = &stderr
	if err := cmd.Run(); err != nil {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		return fmt.Errorf("build %s: %w\n%s\nRemedy: the Go module proxy must be reachable (go env GOPROXY); the sources are in %s", p.name, err, tail(stderr.String(), 15), src)
	}
	return os.Rename(tmp, out)
}

func ldflags(p program) string {
	f := "-s -w"
	if p.source != "k8s" {
		return f
	}
	v := strings.Split(strings.TrimPrefix(Kubernetes, "v"), ".")
	for _, pkg := range []string{"k8s.io/component-base/version", "k8s.io/client-go/pkg/version"} {
		for _, kv := range []string{"gitVersion=" + Kubernetes, "gitMajor=" + v[0], "gitMinor=" + v[1], "gitTreeState=clean", "gitCommit=sandbox", "buildDate=2026-01-01T00:00:00Z"} {
			f += " -X " + pkg + "." + kv
		}
	}
	return f
}

// unpack writes the embedded sources of one module to dir. Files named *.txt lose that ending: Go would
// take a go.mod in the tree for a module of its own and a main.go that imports the world for ours.
func unpack(source, dir string) error {
	root := path.Join("src", source)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	hasMod := false
	err := fs.WalkDir(sources, root, func(p string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || strings.HasSuffix(p, "_test.go") {
			return err
		}
		b, err := sources.ReadFile(p)
		if err != nil {
			return err
		}
		name := strings.TrimSuffix(path.Base(p), ".txt")
		hasMod = hasMod || name == "go.mod"
		return os.WriteFile(filepath.Join(dir, name), b, 0o644)
	})
	if err == nil && !hasMod {
		err = os.WriteFile(filepath.Join(dir, "go.mod"), []byte("module sandbox.local/build/"+source+"\n\ngo 1.26\n"), 0o644)
	}
	return err
}

func tail(s string, n int) string {
	lines := strings.Split(strings.TrimRight(s, "\n"), "\n")
	if len(lines) > n {
		lines = lines[len(lines)-n:]
	}
	return strings.Join(lines, "\n")
}
