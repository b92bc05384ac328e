// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
)

// kernelPackages are the short names: the meta package that depends on the
// newest kernel package of that series.
var kernelPackages = map[string]string{
	"6.1":  "linux-image-cloud-amd64",
	"6.12": "linux-image-6.12-cloud-amd64",
}

var (
	releasePattern = regexp.MustCompile(`^[0-9]+\.[0-9]+[0-9A-Za-z.+~-]*-amd64$`)
	dependsPattern = regexp.MustCompile(`(?m)^\s*Depends: linux-image-(\S+)$`)
)

// Kernel is an unpacked kernel package.
type Kernel struct {
	Release string
	Image   string // what qemu boots
	ModDir  string // .../lib/modules/RELEASE
}

// cache is the folder where kernels live, shared by concurrent runs.
type cache struct {
	dir string
	say func(string, ...any)
}

// Kernel returns the named kernel, fetching and unpacking it on first use.
// name is a short name or a full release such as 6.12.117+deb12-cloud-amd64.
func (c cache) Kernel(ctx context.Context, name string) (Kernel, error) {
	if err := os.MkdirAll(c.dir, 0o755); err != nil {
		return Kernel{}, err
	}
	unlock, err := lockFile(ctx, filepath.Join(c.dir, "lock"))
	if err != nil {
		return Kernel{}, err
	}
	defer unlock()
	release, err := c.release(ctx, name)
	if err != nil {
		return Kernel{}, err
	}
	tree := filepath.Join(c.dir, release)
	if _, err := os.Stat(tree); errors.Is(err, fs.ErrNotExist) {
		if err := c.unpack(ctx, release, tree); err != nil {
			return Kernel{}, fmt.Errorf("kernel %s: %w", release, err)
		}
	}
	k := Kernel{Release: release, Image: filepath.Join(tree, "boot/vmlinux"), ModDir: filepath.Join(tree, "lib/modules", release)}
	if _, err := os.Stat(k.Image); err != nil {
		k.Image = filepath.Join(tree, "boot/vmlinuz-"+release)
	}
	return k, nil
}

// release resolves a short name and remembers it, so that runs agree on the
// kernel until its folder is removed.
func (c cache) release(ctx context.Context, name string) (string, error) {
	if releasePattern.MatchString(name) {
		return name, nil
	}
	meta, ok := kernelPackages[name]
	if !ok {
		return "", fmt.Errorf("unknown kernel %q: use 6.1, 6.12 or a release such as 6.12.117+deb12-cloud-amd64", name)
	}
	alias := filepath.Join(c.dir, "release-"+name)
	if b, err := os.ReadFile(alias); err == nil {
		release := strings.TrimSpace(string(b))
		if _, err := os.Stat(filepath.Join(c.dir, release)); err == nil && releasePattern.MatchString(release) {
			return release, nil
		}
	}
	release := newestRelease(meta)
	if release == "" {
		c.say("refreshing the package lists")
		if out, err := exec.CommandContext(ctx, "apt-get", "-q", "update").CombinedOutput(); err != nil {
			return "", fmt.Errorf("apt-get update: %w\n%s", err, lastLines(out, 10))
		}
		release = newestRelease(meta)
	}
	if release == "" {
		return "", fmt.Errorf("apt knows no package %s: is this Debian 12 with its updates enabled?", meta)
	}
	return release, os.WriteFile(alias, []byte(release+"\n"), 0o644)
}

func newestRelease(meta string) string {
	out, err := exec.Command("apt-cache", "depends", meta).Output()
	if err != nil {
		return ""
	}
	return parseDepends(string(out))
}

// parseDepends reads the kernel release out of "apt-cache depends META".
func parseDepends(out string) string {
	m := dependsPattern.FindStringSubmatch(out)
	if m == nil || !releasePattern.MatchString(m[1]) {
		return ""
	}
	return m[1]
}

// unpack downloads the package and makes tree, whole or not at all.
func (c cache) unpack(ctx context.Context, release, tree string) error {
	work, err := os.MkdirTemp(c.dir, ".unpack-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(work)
	c.say("downloading linux-image-%s", release)
	if err := apt(ctx, work, "download", "linux-image-"+release); err != nil {
		return err
	}
	debs, _ := filepath.Glob(filepath.Join(work, "*.deb"))
	if len(debs) != 1 {
		return fmt.Errorf("apt-get download left %d packages in %s, want 1", len(debs), work)
	}
	c.say("unpacking linux-image-%s", release)
	root := filepath.Join(work, "root")
	if out, err := exec.CommandContext(ctx, "dpkg-deb", "-x", debs[0], root).CombinedOutput(); err != nil {
		return fmt.Errorf("dpkg-deb -x: %w\n%s", err, lastLines(out, 5))
	}
	if usr := filepath.Join(root, "usr/lib/modules"); exists(usr) {
		if err := os.MkdirAll(filepath.Join(root, "lib"), 0o755); err != nil {
			return err
		}
		if err := os.Rename(usr, filepath.Join(root, "lib/modules")); err != nil {
			return err
		}
	}
	modDir := filepath.Join(root, "lib/modules", release)
	if err := unxzModules(ctx, modDir); err != nil {
		return err
	}
	depmod, err := findTool("depmod")
	if err != nil {
		return err
	}
	if out, err := exec.CommandContext(ctx, depmod, "-b", root, release).CombinedOutput(); err != nil {
		return fmt.Errorf("depmod: %w\n%s", err, lastLines(out, 5))
	}
	image, err := os.ReadFile(filepath.Join(root, "boot/vmlinuz-"+release))
	if err != nil {
		return err
	}
	if elf, err := unpackKernel(image); err != nil {
		c.say("booting the packed kernel, which takes longer: %v", err)
	} else if err := os.WriteFile(filepath.Join(root, "boot/vmlinux"), elf, 0o644); err != nil {
		return err
	}
	return os.Rename(root, tree)
}

// unxzModules unpacks the modules here, rather than in the emulated guest at
// each load, and names them so in modules.order.
func unxzModules(ctx context.Context, modDir string) error {
	var packed []string
	err := filepath.WalkDir(modDir, func(path string, d fs.DirEntry, err error) error {
		if err == nil && strings.HasSuffix(path, ".ko.xz") {
			packed = append(packed, path)
		}
		return err
	})
	if err != nil || len(packed) == 0 {
		return err
	}
	cmd := exec.CommandContext(ctx, "xargs", "-0", "-n", "64", "-P", "2", "xz", "-d")
	cmd.Stdin = strings.NewReader(strings.Join(packed, "\x00"))
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("xz -d of the modules: %w\n%s", err, lastLines(out, 5))
	}
	order := filepath.Join(modDir, "modules.order")
	b, err := os.ReadFile(order)
	if err != nil {
		return err
	}
	return os.WriteFile(order, bytes.ReplaceAll(b, []byte(".ko.xz"), []byte(".ko")), 0o644)
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

// lockFile takes an exclusive lock, waiting for other runs; it goes with the
// process at the latest.
func lockFile(ctx context.Context, path string) (unlock func(), err error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return nil, err
	}
	done := make(chan error, 1)
	go func() { done <- syscall.Flock(int(f.Fd()), syscall.LOCK_EX) }()
	select {
	case err = <-done:
	case <-ctx.Done():
		err = ctx.Err()
	}
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("lock %s: %w", path, err)
	}
	return func() { f.Close() }, nil
}
