// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"archive/tar"
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/lash-net/lash/api/agent"
	"github.com/lash-net/lash/internal/model"
)

func TestSysdumpOfThisNode(t *testing.T) {
	socket := serve(t, map[string]any{"/v1/version": agent.Version{}, "/v1/status?nodes": testStatus(), "/v1/db": []agent.TableInfo{}, "/v1/endpoints": []model.Endpoint{}})
	name := filepath.Join(t.TempDir(), "x-<ts>")
	code, out, errOut := run(t, "sysdump", "--this-node", "--output-filename", name, "--socket", socket)
	if code != 0 || !strings.Contains(out, "files, ") || !strings.Contains(errOut, "not collected: bpf/ct.json: GET /v1/bpf/ct: no such thing") {
		t.Errorf("status %d, %q, %q", code, out, errOut)
	}
	entries, err := os.ReadDir(filepath.Dir(name))
	if err != nil || len(entries) != 1 || !strings.HasSuffix(entries[0].Name(), ".tar.gz") || strings.Contains(entries[0].Name(), "<ts>") {
		t.Errorf("%v, %v", entries, err)
	}

	// What another machine asks for, here of a node whose agent is dead.
	code, out, errOut = run(t, "sysdump", "--stream", "--quick=true", "--socket", filepath.Join(t.TempDir(), "none"))
	if code != 0 || errOut != "" {
		t.Errorf("status %d, %q", code, errOut)
	}
	names := map[string]bool{}
	for r := tar.NewReader(bytes.NewReader([]byte(out))); ; {
		h, err := r.Next()
		if err != nil {
			break
		}
		names[h.Name] = true
	}
	if !names["kernel/links.json"] || !names["errors.txt"] || names["status.txt"] {
		t.Errorf("files are %v", names)
	}
}

func TestSysdumpThatCannotBeginLeavesNothing(t *testing.T) {
	dir := t.TempDir()
	config := filepath.Join(dir, "kubeconfig")
	if err := os.WriteFile(config, []byte(`{"apiVersion": "v1", "kind": "Config", "clusters": [{"name": "c", "cluster": {"server": "http://127.0.0.1:1"}}], "contexts": [{"name": "c", "context": {"cluster": "c"}}], "current-context": "c"}`), 0o600); err != nil {
		t.Fatal(err)
	}
	code, _, errOut := run(t, "sysdump", "--kubeconfig", config, "--output-filename", filepath.Join(dir, "d"))
	entries, err := os.ReadDir(dir)
	if code != 1 || !strings.Contains(errOut, "find the agents") || err != nil || len(entries) != 1 {
		t.Errorf("status %d, %q, left %v, %v", code, errOut, entries, err)
	}
}
