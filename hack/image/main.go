// SPDX-License-Identifier: Apache-2.0

// Command image writes Lash's container image as an OCI archive from static binaries,
// without a container engine: one layer, reproducible, importable by containerd (ctr
// images import), podman and skopeo. The same inputs give the same bytes.
package main

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"log"
	"os"
	"path/filepath"
	"runtime"
	"sort"
	"time"
)

const repository = "lash.local/lash"

func main() {
	log.SetFlags(0)
	version := flag.String("version", "dev", "tag of the image")
	out := flag.String("out", "dist/lash.oci.tar", "archive to write")
	flag.Parse()
	if flag.NArg() == 0 {
		log.Fatal("image: no binaries: name those that belong into /usr/bin of the image")
	}
	archive, err := build(*version, flag.Args())
	if err != nil {
		log.Fatalf("image: %v", err)
	}
	if err := os.MkdirAll(filepath.Dir(*out), 0o755); err != nil {
		log.Fatalf("image: %v", err)
	}
	if err := os.WriteFile(*out, archive, 0o644); err != nil {
		log.Fatalf("image: %v", err)
	}
	fmt.Printf("%s: %s:%s, %d MiB\n", *out, repository, *version, len(archive)>>20)
}

type descriptor struct {
	MediaType   string            `json:"mediaType"`
	Digest      string            `json:"digest"`
	Size        int               `json:"size"`
	Annotations map[string]string `json:"annotations,omitempty"`
}

func digest(b []byte) string {
	sum := sha256.Sum256(b)
	return "sha256:" + hex.EncodeToString(sum[:])
}

// build is the archive: an OCI layout, with Docker's manifest.json beside it for tools that read only that.
func build(version string, binaries []string) ([]byte, error) {
	layer, err := rootfs(binaries)
	if err != nil {
		return nil, err
	}
	var packed bytes.Buffer
	zw, err := gzip.NewWriterLevel(&packed, gzip.BestSpeed)
	if err != nil {
		return nil, err
	}
	if _, err := zw.Write(layer); err != nil {
		return nil, err
	}
	if err := zw.Close(); err != nil {
		return nil, err
	}
	config, err := json.Marshal(map[string]any{
		"architecture": runtime.GOARCH, "os": "linux", "created": time.Unix(0, 0).UTC(),
		"config": map[string]any{"Env": []string{"PATH=/usr/bin"}, "Cmd": []string{"/usr/bin/lash-agent"}},
		"rootfs": map[string]any{"type": "layers", "diff_ids": []string{digest(layer)}},
	})
	if err != nil {
		return nil, err
	}
	blobs := map[string][]byte{digest(config): config, digest(packed.Bytes()): packed.Bytes()}
	manifest, err := json.Marshal(map[string]any{
		"schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
		"config": descriptor{"application/vnd.oci.image.config.v1+json", digest(config), len(config), nil},
		"layers": []descriptor{{"application/vnd.oci.image.layer.v1.tar+gzip", digest(packed.Bytes()), packed.Len(), nil}},
	})
	if err != nil {
		return nil, err
	}
	blobs[digest(manifest)] = manifest
	name := repository + ":" + version
	index, err := json.Marshal(map[string]any{
		"schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json",
		"manifests": []descriptor{{"application/vnd.oci.image.manifest.v1+json", digest(manifest), len(manifest),
			map[string]string{"io.containerd.image.name": name, "org.opencontainers.image.ref.name": version}}},
	})
	if err != nil {
		return nil, err
	}
	blob := func(d string) string { return "blobs/sha256/" + d[len("sha256:"):] }
	docker, err := json.Marshal([]map[string]any{{
		"Config": blob(digest(config)), "RepoTags": []string{name}, "Layers": []string{blob(digest(packed.Bytes()))},
	}})
	if err != nil {
		return nil, err
	}
	files := map[string][]byte{"oci-layout": []byte(`{"imageLayoutVersion":"1.0.0"}`), "index.json": index, "manifest.json": docker}
	for d, b := range blobs {
		files[blob(d)] = b
	}
	var archive bytes.Buffer
	tw := tar.NewWriter(&archive)
	names := make([]string, 0, len(files))
	for n := range files {
		names = append(names, n)
	}
	sort.Strings(names)
	for _, n := range names {
		if err := add(tw, n, files[n], 0o644); err != nil {
			return nil, err
		}
	}
	return archive.Bytes(), tw.Close()
}

// rootfs is the one layer: the binaries and what a Go program expects of a root file system.
func rootfs(binaries []string) ([]byte, error) {
	var b bytes.Buffer
	tw := tar.NewWriter(&b)
	for _, dir := range []string{"etc", "etc/lash", "tmp", "usr", "usr/bin", "var", "var/run"} {
		mode := int64(0o755)
		if dir == "tmp" {
			mode = 0o1777
		}
		if err := tw.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: dir + "/", Mode: mode, ModTime: time.Unix(0, 0)}); err != nil {
			return nil, err
		}
	}
	if err := add(tw, "etc/passwd", []byte("root:x:0:0:root:/:/usr/bin/lash\n"), 0o644); err != nil {
		return nil, err
	}
	for _, path := range binaries {
		f, err := os.ReadFile(path)
		if err != nil {
			return nil, err
		}
		if err := add(tw, "usr/bin/"+filepath.Base(path), f, 0o755); err != nil {
			return nil, err
		}
	}
	return b.Bytes(), tw.Close()
}

func add(tw *tar.Writer, name string, content []byte, mode int64) error {
	if err := tw.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name, Size: int64(len(content)), Mode: mode, ModTime: time.Unix(0, 0)}); err != nil {
		return err
	}
	_, err := io.Copy(tw, bytes.NewReader(content))
	return err
}
