// SPDX-License-Identifier: Apache-2.0

package build

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestEverySourceUnpacksToAModule(t *testing.T) {
	for _, p := range programs() {
		dir := t.TempDir()
		if err := unpack(p.source, dir); err != nil {
			t.Fatal(err)
		}
		b, err := os.ReadFile(filepath.Join(dir, "go.mod"))
		if err != nil || !strings.HasPrefix(string(b), "module ") {
			t.Errorf("%s: no go.mod: %v", p.source, err)
		}
		left, err := filepath.Glob(filepath.Join(dir, "*.txt"))
		if err != nil || len(left) > 0 {
			t.Errorf("%s: left %v %v", p.source, left, err)
		}
	}
}

func TestKubernetesVersionIsTheOneInItsModule(t *testing.T) {
	b, err := sources.ReadFile("src/k8s/go.mod.txt")
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(b), "require k8s.io/kubernetes "+Kubernetes+"\n") {
		t.Errorf("src/k8s/go.mod.txt does not require %s", Kubernetes)
	}
	for file, v := range map[string]string{"src/etcd/go.mod.txt": "go.etcd.io/etcd/server/v3 " + Etcd, "src/coredns/go.mod.txt": "github.com/coredns/coredns " + CoreDNS} {
		if b, err := sources.ReadFile(file); err != nil || !strings.Contains(string(b), v) {
			t.Errorf("%s does not require %s (%v)", file, v, err)
		}
	}
}

func TestVersionIsBuiltWithoutTheFilesOfAnother(t *testing.T) {
	c, p := Cache(t.TempDir()), program{name: "pause", source: "pause", pkg: ".", version: "new"}
	other := p
	other.version = "old"
	if err := unpack(other.source, c.src(other)); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(c.src(other), "gone.go"), []byte("package main\n\nfunc main() {}\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := c.one(t.Context(), p); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(c.path(p)); err != nil {
		t.Error(err)
	}
}

func TestInterruptedBuildLeavesNothing(t *testing.T) {
	c := Cache(t.TempDir())
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	missing := 0
	for _, set := range []Set{Cluster, Conformance} {
		if err := c.Ensure(ctx, set, func(string, ...any) {}); err == nil {
			t.Fatal("a cancelled build succeeded")
		}
		missing += len(c.Missing(set))
	}
	if missing != len(programs()) {
		t.Errorf("%d of %d programs missing", missing, len(programs()))
	}
}
