// SPDX-License-Identifier: Apache-2.0

// Package internal holds only the test of who may import whom (ARCHITECTURE.md).
package internal

import (
	"encoding/json"
	"errors"
	"io"
	"os/exec"
	"strings"
	"testing"
)

const module = "github.com/lash-net/lash/"

// allowed names, for each layer, what of this module it may import.
var allowed = map[string][]string{
	"internal/model":           {},
	"internal/version":         {},
	"internal/state":           {"internal/model", "internal/reconcile", "api/agent"},
	"internal/config":          {"internal/model"},
	"internal/reconcile":       {},
	"internal/node":            {"internal/model", "internal/state", "internal/reconcile"},
	"internal/service":         {"internal/model", "internal/state"},
	"internal/ipam":            {"internal/model", "internal/state"},
	"internal/podcidr":         {"internal/model", "internal/state"},
	"internal/k8s":             {"api/", "internal/model", "internal/state", "internal/reconcile"},
	"bpf":                      {},
	"internal/datapath":        {"bpf", "internal/model", "internal/state", "internal/reconcile"},
	"internal/datapath/netdev": {"bpf", "internal/model", "internal/state", "internal/reconcile"},
	"internal/cni":             {},
	"internal/endpoint":        {"api/", "internal/model", "internal/state", "internal/cni"},
	"internal/server":          {"api/", "internal/model", "internal/state", "internal/reconcile"},
	"cmd/lash-cni":             {"internal/cni", "internal/model"},
}

func TestImportRules(t *testing.T) {
	out, err := exec.Command("go", "list", "-json=ImportPath,Imports", module+"...").Output()
	if err != nil {
		t.Fatalf("go list: %v", err)
	}
	seen := map[string]bool{}
	dec := json.NewDecoder(strings.NewReader(string(out)))
	for {
		var p struct {
			ImportPath string
			Imports    []string
		}
		if err := dec.Decode(&p); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		name := strings.TrimPrefix(p.ImportPath, module)
		may, ruled := allowed[name]
		seen[name] = true
		for _, imp := range p.Imports {
			dep, ours := strings.CutPrefix(imp, module)
			if strings.HasPrefix(dep, "cmd/") {
				t.Errorf("%s imports %s: commands are imported by nobody", name, dep)
			}
			if !ruled {
				continue
			}
			if ours && !permitted(may, dep) {
				t.Errorf("%s may not import %s", name, dep)
			}
			if strings.HasPrefix(imp, "k8s.io/client-go") && name != "internal/k8s" {
				t.Errorf("%s imports %s: only internal/k8s talks to the API server", name, imp)
			}
		}
	}
	for name := range allowed {
		if !seen[name] {
			t.Errorf("the rules name %s, which does not exist", name)
		}
	}
}

func permitted(may []string, dep string) bool {
	for _, m := range may {
		if dep == m || strings.HasSuffix(m, "/") && strings.HasPrefix(dep, m) {
			return true
		}
	}
	return false
}
