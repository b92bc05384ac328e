// SPDX-License-Identifier: Apache-2.0

package cluster

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/lash-net/lash/sandbox/image"
)

// GoldenCommand is the hidden subcommand that imports images into a containerd root, in namespaces of its own.
const GoldenCommand = "__golden"

// golden returns a containerd root directory with the sandbox's images and nothing else, made once for
// each set of images. Every node starts from hard links of it: kubelet is quick only where containerd
// has no containers of a former life.
func (c *Cluster) golden(ctx context.Context) (string, error) {
	archives, err := image.Ensure(filepath.Join(CacheDir, "images"), c.cache.Bin, c.Say)
	if err != nil {
		return "", err
	}
	version, err := exec.CommandContext(ctx, "containerd", "--version").Output()
	if err != nil {
		return "", fmt.Errorf("containerd --version: %w", err)
	}
	sum := sha256.Sum256([]byte(string(version) + strings.Join(archives, "\n")))
	base := filepath.Join(CacheDir, "golden")
	dir := filepath.Join(base, hex.EncodeToString(sum[:6]))
	if _, err := os.Stat(dir); err == nil {
		return dir, nil
	}
	c.Say("importing images into a containerd root (once)")
	if err := os.MkdirAll(base, 0o755); err != nil {
		return "", err
	}
	tmp, err := os.MkdirTemp(base, ".new-*")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(tmp)
	self, err := os.Executable()
	if err != nil {
		return "", err
	}
	cmd := exec.CommandContext(ctx, self, append([]string{GoldenCommand, tmp}, archives...)...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL,
		Cloneflags: unix.CLONE_NEWNS | unix.CLONE_NEWPID | unix.CLONE_NEWNET | unix.CLONE_NEWIPC}
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("import images: %w: %s", err, lastLines(string(out), 10))
	}
	for _, junk := range []string{"io.containerd.runtime.v1.linux", "io.containerd.runtime.v2.task", "tmpmounts"} {
		_ = os.RemoveAll(filepath.Join(tmp, junk))
	}
	old, _ := filepath.Glob(filepath.Join(base, "*"))
	if err := os.Rename(tmp, dir); err != nil {
		return "", err
	}
	for _, d := range old { // nodes hold links of their own
		if d != tmp {
			_ = os.RemoveAll(d)
		}
	}
	return dir, nil
}

// RunGolden is GoldenCommand: process 1 of its own pid namespace, so that whatever it started ends with it.
func RunGolden(root string, archives []string) error {
	if err := errors.Join(
		unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""),
		unix.Mount("proc", "/proc", "proc", 0, ""),
		unix.Mount("run", "/run", "tmpfs", 0, "mode=755"),
	); err != nil {
		return err
	}
	const sock = "/run/c.sock"
	conf := fmt.Sprintf("version = 2\nroot = %q\nstate = \"/run/c\"\ndisabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n[grpc]\n  address = %q\n", root, sock)
	if err := os.WriteFile("/run/c.toml", []byte(conf), 0o644); err != nil {
		return err
	}
	daemon := exec.Command("containerd", "--config", "/run/c.toml", "--log-level", "warn")
	daemon.Stdout, daemon.Stderr = os.Stdout, os.Stderr
	if err := daemon.Start(); err != nil {
		return err
	}
	deadline := time.Now().Add(60 * time.Second)
	for exec.Command("ctr", "-a", sock, "version").Run() != nil {
		if time.Now().After(deadline) {
			return errors.New("containerd does not answer within 60 s")
		}
		time.Sleep(50 * time.Millisecond)
	}
	for _, a := range archives {
		if out, err := exec.Command("ctr", "-a", sock, "-n", "k8s.io", "images", "import", a).CombinedOutput(); err != nil {
			return fmt.Errorf("%s: %w: %s", a, err, out)
		}
	}
	if err := daemon.Process.Signal(syscall.SIGTERM); err != nil {
		return err
	}
	_ = daemon.Wait() // its databases are closed and consistent now
	return nil
}

// cloneRoot makes dst from hard links of src; databases and other files that are written to are copied.
func cloneRoot(src, dst string) error {
	return filepath.WalkDir(src, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(src, p)
		if err != nil {
			return err
		}
		to := filepath.Join(dst, rel)
		info, err := d.Info()
		if err != nil {
			return err
		}
		switch {
		case d.IsDir():
			if err := os.MkdirAll(to, info.Mode().Perm()); err != nil {
				return err
			}
			return os.Chmod(to, info.Mode())
		case info.Mode().IsRegular() && strings.HasSuffix(p, ".db"):
			return copyFile(p, to, info.Mode())
		}
		err = os.Link(p, to)
		if errors.Is(err, syscall.EXDEV) && info.Mode().IsRegular() {
			return copyFile(p, to, info.Mode())
		}
		if errors.Is(err, syscall.EXDEV) && info.Mode()&fs.ModeSymlink != 0 {
			target, err := os.Readlink(p)
			if err != nil {
				return err
			}
			return os.Symlink(target, to)
		}
		return err
	})
}

func copyFile(from, to string, mode fs.FileMode) error {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, mode.Perm())
	if err != nil {
		return err
	}
	if _, err := io.Copy(out, in); err != nil {
		out.Close()
		return err
	}
	return out.Close()
}

func lastLines(s string, n int) string {
	lines := strings.Split(strings.TrimSpace(s), "\n")
	return strings.Join(lines[max(0, len(lines)-n):], "\n")
}
