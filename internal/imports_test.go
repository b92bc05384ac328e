// SPDX-License-Identifier: Apache-2.0

// Package internal holds only the test of who may import whom (ARCHITECTURE.md).
package internal

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"os/exec"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/lash-net/lash/"

// rule says what the packages below path may import: of this module, and of other modules (by prefix). Nothing is said
// about the standard library, nor about tests.
type rule struct {
	path  string
	own   []string
	other []string
}

const (
	statedb = "github.com/cilium/statedb"
	ebpf    = "github.com/cilium/ebpf"
	k8sio   = "k8s.io/"
	netlink = "github.com/vishvananda/"
	xsys    = "golang.org/x/sys/"
)

// rules are the table "who may import whom" of ARCHITECTURE.md, the most specific path first. What meets in no rule is
// an error, so that a new package is given its place.
var rules = []rule{
	{"internal/model", nil, nil},
	{"internal/version", nil, nil},
	{"internal/reconcile", nil, []string{statedb}},
	{"internal/state", []string{"internal/model", "internal/reconcile"}, []string{statedb}},
	{"internal/config", []string{"internal/model"}, []string{"sigs.k8s.io/yaml"}},
	// Pure stages: never each other, never the API server, BPF or the kernel.
	{"internal/health", stage, []string{statedb, "golang.org/x/net/", xsys}},
	{"internal/identity", stage, []string{statedb}},
	{"internal/ipam", stage, []string{statedb}},
	{"internal/node", stage, []string{statedb}},
	{"internal/podcidr", stage, []string{statedb}},
	{"internal/policy", stage, []string{statedb}},
	{"internal/service", stage, []string{statedb}},
	{"internal/k8s", []string{"api", "internal/model", "internal/state", "internal/reconcile"}, []string{statedb, k8sio}},
	{"internal/datapath", []string{"bpf", "internal/datapath", "internal/model", "internal/state", "internal/reconcile"}, []string{ebpf, netlink, xsys, statedb, "github.com/google/nftables"}},
	{"internal/monitor", []string{"bpf", "internal/model"}, []string{"github.com/gopacket/"}},
	{"internal/events", []string{"internal/monitor"}, []string{xsys}},
	// It reads everything that forwarding depends on, and writes nothing.
	{"internal/explain", []string{"api", "bpf", "internal/datapath", "internal/model", "internal/monitor", "internal/state"}, []string{statedb, xsys, "github.com/gopacket/"}},
	{"internal/flow", []string{"bpf", "api", "internal/model", "internal/state"}, []string{ebpf, statedb}},
	{"internal/cni", []string{"api", "internal/model"}, []string{xsys}},
	// The datapath only through interfaces that these define.
	{"internal/endpoint", []string{"api", "internal/cni", "internal/model", "internal/state"}, []string{statedb, xsys}},
	{"internal/server", []string{"api", "internal/model", "internal/state"}, []string{statedb}},
	{"internal/operator", []string{"api", "internal/config", "internal/model", "internal/podcidr", "internal/k8s", "internal/reconcile", "internal/service", "internal/state"}, []string{k8sio, statedb}},
	{"api/agent", []string{"internal/model"}, nil},
	{"api", []string{"api"}, []string{k8sio, "sigs.k8s.io/"}},
	{"bpf", []string{"bpf"}, []string{ebpf}},
	// The plugin is executed for every pod: it stays small.
	{"cmd/lash-cni", []string{"api", "internal/cni", "internal/model", "internal/version"}, nil},
	// The places where things meet.
	{"cmd/lash-agent", []string{""}, []string{""}},
	{"cmd/lash-operator", []string{""}, []string{""}},
}

var stage = []string{"internal/model", "internal/state", "internal/reconcile"}

// free are packages outside of the layers: the CLI's side and tests' helpers.
var free = []string{"cmd/lash", "internal/cli", "internal/install", "internal/image", "internal/sysdump", "internal/testutil", "internal/bench", "test", "sandbox", "deploy", "hack"}

type goPackage struct {
	ImportPath string
	Standard   bool
	Imports    []string
}

func TestImportRules(t *testing.T) {
	cmd := exec.Command("go", "list", "-json=ImportPath,Imports", "./...")
	cmd.Dir = ".."
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil && len(out) == 0 {
		t.Fatalf("go list: %v: %s", err, stderr.String())
	}
	checked := 0
	for dec := json.NewDecoder(bytes.NewReader(out)); ; {
		var p goPackage
		if err := dec.Decode(&p); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		path, ours := strings.CutPrefix(p.ImportPath, module)
		if !ours {
			continue
		}
		r, ok := ruleFor(path)
		if !ok {
			if path != "internal" && !slices.ContainsFunc(free, func(f string) bool { return below(path, f) }) {
				t.Errorf("%s is in no layer: give it a rule here and in ARCHITECTURE.md", path)
			}
			continue
		}
		checked++
		for _, problem := range violations(r, path, p.Imports) {
			t.Error(problem)
		}
	}
	if checked < 10 {
		t.Errorf("only %d packages were checked", checked)
	}
}

// The rules must be able to fail.
func TestImportRulesCatchViolations(t *testing.T) {
	for _, tc := range []struct{ path, imports string }{
		{"internal/model", module + "internal/state"},
		{"internal/model", statedb},
		{"internal/service", module + "internal/node"},
		{"internal/service", module + "internal/k8s"},
		{"internal/node", module + "internal/datapath"},
		{"internal/node", "k8s.io/api/core/v1"},
		{"internal/server", module + "internal/datapath"},
		{"internal/endpoint", module + "internal/datapath/netdev"},
		{"internal/datapath/netdev", module + "internal/endpoint"},
		{"cmd/lash-cni", "k8s.io/client-go/rest"},
		{"api/agent", "k8s.io/client-go/rest"},
	} {
		r, ok := ruleFor(tc.path)
		if !ok || len(violations(r, tc.path, []string{tc.imports})) != 1 {
			t.Errorf("%s importing %s is not caught", tc.path, tc.imports)
		}
	}
	r, _ := ruleFor("internal/service")
	if v := violations(r, "internal/service", []string{"slices", "net/netip", module + "internal/state", statedb + "/index"}); len(v) != 0 {
		t.Errorf("allowed imports are refused: %v", v)
	}
}

func ruleFor(path string) (rule, bool) {
	i := slices.IndexFunc(rules, func(r rule) bool { return below(path, r.path) })
	if i < 0 {
		return rule{}, false
	}
	return rules[i], true
}

func violations(r rule, path string, imports []string) []string {
	var out []string
	for _, imp := range imports {
		own, ours := strings.CutPrefix(imp, module)
		switch {
		case ours:
			if !slices.ContainsFunc(r.own, func(a string) bool { return below(own, a) }) {
				out = append(out, path+" must not import "+own)
			}
		case strings.Contains(strings.Split(imp, "/")[0], "."): // a standard package has no dot in its first element
			if !slices.ContainsFunc(r.other, func(a string) bool { return strings.HasPrefix(imp, a) }) {
				out = append(out, path+" must not import "+imp)
			}
		}
	}
	return out
}

// below reports whether path is dir or in it; "" is everywhere.
func below(path, dir string) bool {
	return dir == "" || path == dir || strings.HasPrefix(path, dir+"/")
}
