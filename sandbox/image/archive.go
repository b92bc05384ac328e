// SPDX-License-Identifier: Apache-2.0

// Package image makes container images from local programs, without a registry: a file tree in memory,
// written as one layer of a docker-archive tar that `ctr images import` takes.
package image

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"sort"
	"strings"
	"time"
)

// Config is what a container of the image runs with.
type Config struct {
	Entrypoint []string `json:",omitempty"`
	Cmd        []string `json:",omitempty"`
	Env        []string `json:",omitempty"`
	User       string   `json:",omitempty"`
}

// Tree is a root file system in the making; keys are absolute paths.
type Tree struct {
	entries map[string]entry
}

type entry struct {
	mode   fs.FileMode // type bits: directory, symlink or regular
	data   []byte
	source string // read from here when written, instead of data
	link   string
}

// New returns a tree with nothing but its root.
func New() *Tree { return &Tree{entries: map[string]entry{}} }

// Dir adds a directory and its parents.
func (t *Tree) Dir(p string, mode fs.FileMode) {
	t.parents(p)
	t.entries[path.Clean(p)] = entry{mode: fs.ModeDir | mode}
}

// File adds a regular file.
func (t *Tree) File(p string, data []byte, mode fs.FileMode) {
	t.parents(p)
	t.entries[path.Clean(p)] = entry{mode: mode, data: data}
}

// Copy adds a file of this machine; it is read when the archive is written.
func (t *Tree) Copy(p, source string, mode fs.FileMode) error {
	if st, err := os.Stat(source); err != nil {
		return err
	} else if !st.Mode().IsRegular() {
		return fmt.Errorf("%s is not a regular file", source)
	}
	t.parents(p)
	t.entries[path.Clean(p)] = entry{mode: mode, source: source}
	return nil
}

// Link adds a symbolic link.
func (t *Tree) Link(p, target string) {
	t.parents(p)
	t.entries[path.Clean(p)] = entry{mode: fs.ModeSymlink | 0o777, link: target}
}

// Has says whether the tree has p.
func (t *Tree) Has(p string) bool { _, ok := t.entries[path.Clean(p)]; return ok }

func (t *Tree) parents(p string) {
	for d := path.Dir(path.Clean(p)); d != "/" && d != "."; d = path.Dir(d) {
		if _, ok := t.entries[d]; !ok {
			t.entries[d] = entry{mode: fs.ModeDir | 0o755}
		}
	}
}

// layer writes the tree as a tar with names sorted and times zero: the same tree gives the same bytes.
func (t *Tree) layer(w io.Writer) error {
	names := make([]string, 0, len(t.entries))
	for n := range t.entries {
		names = append(names, n)
	}
	sort.Strings(names)
	tw := tar.NewWriter(w)
	for _, n := range names {
		e := t.entries[n]
		h := &tar.Header{Name: strings.TrimPrefix(n, "/"), Mode: int64(e.mode.Perm()), ModTime: time.Unix(0, 0), Format: tar.FormatPAX}
		if e.mode&fs.ModeSticky != 0 {
			h.Mode |= 0o1000
		}
		data := e.data
		switch {
		case e.mode.IsDir():
			h.Typeflag, h.Name = tar.TypeDir, h.Name+"/"
		case e.mode&fs.ModeSymlink != 0:
			h.Typeflag, h.Linkname = tar.TypeSymlink, e.link
		default:
			h.Typeflag = tar.TypeReg
			if e.source != "" {
				b, err := os.ReadFile(e.source)
				if err != nil {
					return err
				}
				data = b
			}
			h.Size = int64(len(data))
		}
		if err := tw.WriteHeader(h); err != nil {
			return fmt.Errorf("layer entry %s: %w", n, err)
		}
		if _, err := tw.Write(data); err != nil {
			return fmt.Errorf("layer entry %s: %w", n, err)
		}
	}
	return tw.Close()
}

// Image is a configuration of a tree, and its names.
type Image struct {
	Config Config
	Tags   []string
}

// Write writes the tree as a docker-archive: images that share it as their one layer.
func (t *Tree) Write(w io.Writer, arch string, images ...Image) error {
	var layer bytes.Buffer
	if err := t.layer(&layer); err != nil {
		return err
	}
	sum := sha256.Sum256(layer.Bytes())
	epoch := time.Unix(0, 0).UTC().Format(time.RFC3339)
	type file struct {
		name string
		data []byte
	}
	var manifest []any
	files := []file{{"layer.tar", layer.Bytes()}}
	for i, img := range images {
		config, err := json.Marshal(map[string]any{
			"architecture": arch, "os": "linux", "created": epoch, "config": img.Config,
			"rootfs":  map[string]any{"type": "layers", "diff_ids": []string{"sha256:" + hex.EncodeToString(sum[:])}},
			"history": []any{map[string]string{"created": epoch, "created_by": "sandbox"}},
		})
		if err != nil {
			return err
		}
		name := fmt.Sprintf("config%d.json", i)
		manifest = append(manifest, map[string]any{"Config": name, "RepoTags": img.Tags, "Layers": []string{"layer.tar"}})
		files = append(files, file{name, config})
	}
	list, err := json.Marshal(manifest)
	if err != nil {
		return err
	}
	tw := tar.NewWriter(w)
	for _, f := range append(files, file{"manifest.json", list}) {
		h := &tar.Header{Typeflag: tar.TypeReg, Name: f.name, Mode: 0o644, Size: int64(len(f.data)), ModTime: time.Unix(0, 0)}
		if err := tw.WriteHeader(h); err != nil {
			return err
		}
		if _, err := tw.Write(f.data); err != nil {
			return err
		}
	}
	return tw.Close()
}
