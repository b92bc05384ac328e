// SPDX-License-Identifier: Apache-2.0

package image

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"io"
	"os"
	"path/filepath"
	"testing"
)

func files(t *testing.T, b []byte) map[string][]byte {
	t.Helper()
	out := map[string][]byte{}
	r := tar.NewReader(bytes.NewReader(b))
	for {
		h, err := r.Next()
		if err == io.EOF {
			return out
		}
		if err != nil {
			t.Fatal(err)
		}
		data, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		if h.Typeflag == tar.TypeSymlink {
			data = []byte("-> " + h.Linkname)
		}
		out[h.Name] = data
	}
}

func TestArchiveNamesItsLayerByDigest(t *testing.T) {
	src := filepath.Join(t.TempDir(), "prog")
	if err := os.WriteFile(src, []byte("program"), 0o755); err != nil {
		t.Fatal(err)
	}
	make := func() []byte {
		tree := base()
		if err := tree.Copy("/opt/x/prog", src, 0o755); err != nil {
			t.Fatal(err)
		}
		tree.Link("/bin/p", "/opt/x/prog")
		var b bytes.Buffer
		if err := tree.Write(&b, "amd64", Image{Config{Entrypoint: []string{"/bin/p"}}, []string{"sandbox.local/x:1", "sandbox.local/x:2"}},
			Image{Config{Cmd: []string{"sh"}}, []string{"sandbox.local/y:1"}}); err != nil {
			t.Fatal(err)
		}
		return b.Bytes()
	}
	one, two := make(), make()
	if !bytes.Equal(one, two) {
		t.Error("the same tree gives different archives")
	}
	f := files(t, one)
	var manifest []struct {
		Config   string
		RepoTags []string
		Layers   []string
	}
	if err := json.Unmarshal(f["manifest.json"], &manifest); err != nil || len(manifest) != 2 || len(manifest[0].RepoTags) != 2 || len(manifest[1].RepoTags) != 1 {
		t.Fatalf("manifest %s: %v", f["manifest.json"], err)
	}
	var cfg struct {
		Config Config
		Rootfs struct {
			DiffIDs []string `json:"diff_ids"`
		}
	}
	if err := json.Unmarshal(f[manifest[0].Config], &cfg); err != nil {
		t.Fatal(err)
	}
	if len(cfg.Config.Entrypoint) != 1 || manifest[0].Config == manifest[1].Config || manifest[0].Layers[0] != manifest[1].Layers[0] {
		t.Errorf("two images of a tree share more or less than their layer: %s", f["manifest.json"])
	}
	layer := f[manifest[0].Layers[0]]
	sum := sha256.Sum256(layer)
	if got, want := cfg.Rootfs.DiffIDs[0], "sha256:"+hex.EncodeToString(sum[:]); got != want {
		t.Errorf("diff id %s, layer is %s", got, want)
	}
	l := files(t, layer)
	if string(l["opt/x/prog"]) != "program" || string(l["bin/p"]) != "-> /opt/x/prog" {
		t.Errorf("layer: %q %q", l["opt/x/prog"], l["bin/p"])
	}
	if _, ok := l["opt/x/"]; !ok {
		t.Error("a parent directory is missing")
	}
}

func TestCopyRefusesWhatIsNoFile(t *testing.T) {
	if err := New().Copy("/x", t.TempDir(), 0o755); err == nil {
		t.Error("a directory was accepted")
	}
	if err := New().Copy("/x", "/does/not/exist", 0o755); err == nil {
		t.Error("a missing file was accepted")
	}
}

func TestArchivesAreMadeOnceAndAnewWhenTheirNamesOrInputsChange(t *testing.T) {
	dir, src := t.TempDir(), filepath.Join(t.TempDir(), "prog")
	if err := os.WriteFile(src, []byte("program"), 0o755); err != nil {
		t.Fatal(err)
	}
	made := 0
	archives := func(layout string) string {
		got, err := ensure(dir, func(string, ...any) { made++ }, []recipe{{name: "x", inputs: []string{src}, images: []Image{{Tags: []string{"x:1"}}}, layout: layout,
			make: func() (*Tree, error) { tree := New(); return tree, tree.Copy("/x", src, 0o755) }}})
		if err != nil || len(got) != 1 {
			t.Fatal(got, err)
		}
		return got[0]
	}
	one := archives("")
	if again := archives(""); again != one || made != 1 {
		t.Errorf("%s, then %s, made %d times", one, again, made)
	}
	two := archives("x:2")
	if two == one || made != 2 {
		t.Errorf("a new name keeps the archive: %s, made %d times", two, made)
	}
	if err := os.WriteFile(src, []byte("another"), 0o755); err != nil {
		t.Fatal(err)
	}
	if three := archives("x:2"); three == two || made != 3 {
		t.Errorf("a new program keeps the archive: %s, made %d times", three, made)
	}
	if left, err := filepath.Glob(filepath.Join(dir, "x-*.tar")); err != nil || len(left) != 1 {
		t.Errorf("left: %v %v", left, err)
	}
}
