// SPDX-License-Identifier: Apache-2.0

package main

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"io"
	"os"
	"path/filepath"
	"testing"
)

func TestArchiveIsReproducibleAndItsDigestsHold(t *testing.T) {
	bin := filepath.Join(t.TempDir(), "lash-agent")
	if err := os.WriteFile(bin, []byte("not really"), 0o755); err != nil {
		t.Fatal(err)
	}
	first, err := build("v1", []string{bin})
	if err != nil {
		t.Fatal(err)
	}
	second, err := build("v1", []string{bin})
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(first, second) {
		t.Error("the same input gave two archives")
	}
	files := map[string][]byte{}
	tr := tar.NewReader(bytes.NewReader(first))
	for {
		h, err := tr.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		if files[h.Name], err = io.ReadAll(tr); err != nil {
			t.Fatal(err)
		}
	}
	for name, content := range files {
		if dir, base := filepath.Split(name); dir == "blobs/sha256/" && digest(content) != "sha256:"+base {
			t.Errorf("%s has digest %s", name, digest(content))
		}
	}
	var index struct {
		Manifests []descriptor `json:"manifests"`
	}
	if err := json.Unmarshal(files["index.json"], &index); err != nil || len(index.Manifests) != 1 {
		t.Fatalf("index.json: %v: %s", err, files["index.json"])
	}
	if got := index.Manifests[0].Annotations["io.containerd.image.name"]; got != "lash.local/lash:v1" {
		t.Errorf("image is called %q", got)
	}
	if _, ok := files["blobs/sha256/"+index.Manifests[0].Digest[7:]]; !ok {
		t.Error("the index names a manifest that is not there")
	}
}

func TestMissingBinaryIsNamed(t *testing.T) {
	if _, err := build("v1", []string{"/nowhere/lash-agent"}); err == nil {
		t.Error("no error for a binary that does not exist")
	}
}
