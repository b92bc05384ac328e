// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"strings"
)

// virtiofsd shares the host's files; Debian 12 has it outside PATH.
var virtiofsdPaths = []string{"/usr/lib/qemu/virtiofsd", "/usr/libexec/virtiofsd"}

// tools are the host's programs and the Debian packages that bring them.
var tools = []struct{ program, pkg string }{
	{"qemu-system-x86_64", "qemu-system-x86"},
	{"depmod", "kmod"},
	{"xz", "xz-utils"},
	{"dpkg-deb", "dpkg"},
}

// findTool looks in PATH and in the system folders that a user's PATH lacks.
func findTool(name string) (string, error) {
	if p, err := exec.LookPath(name); err == nil {
		return p, nil
	}
	for _, dir := range []string{"/usr/sbin", "/sbin"} {
		if p := dir + "/" + name; executable(p) {
			return p, nil
		}
	}
	return "", fmt.Errorf("no %s in PATH", name)
}

func executable(path string) bool {
	st, err := os.Stat(path)
	return err == nil && st.Mode().IsRegular() && st.Mode()&0o111 != 0
}

func findVirtiofsd() (string, error) {
	for _, p := range virtiofsdPaths {
		if executable(p) {
			return p, nil
		}
	}
	return findTool("virtiofsd")
}

// missingPackages lists what installTools would install.
func missingPackages() []string {
	var pkgs []string
	for _, t := range tools {
		if _, err := findTool(t.program); err != nil {
			pkgs = append(pkgs, t.pkg)
		}
	}
	if _, err := findVirtiofsd(); err != nil {
		pkgs = append(pkgs, virtiofsdPackage())
	}
	return pkgs
}

// virtiofsdPackage: a package of its own from Debian 13 on.
func virtiofsdPackage() string {
	if out, err := exec.Command("apt-cache", "policy", "virtiofsd").Output(); err == nil && bytes.Contains(out, []byte("Candidate:")) {
		return "virtiofsd"
	}
	return "qemu-system-common"
}

// installTools brings the missing host programs from the apt archive.
func installTools(ctx context.Context, say func(string, ...any)) error {
	pkgs := missingPackages()
	if len(pkgs) == 0 {
		return nil
	}
	say("installing %s", strings.Join(pkgs, " "))
	if err := apt(ctx, "", append([]string{"install", "-y", "--no-install-recommends"}, pkgs...)...); err != nil {
		return err
	}
	if left := missingPackages(); len(left) > 0 {
		return fmt.Errorf("apt-get installed %s, and %s is still missing", strings.Join(pkgs, " "), strings.Join(left, " "))
	}
	return nil
}

// apt runs apt-get; when it fails, once more after refreshing the package lists.
func apt(ctx context.Context, dir string, args ...string) error {
	run := func(args ...string) ([]byte, error) {
		cmd := exec.CommandContext(ctx, "apt-get", append([]string{"-q"}, args...)...)
		cmd.Dir = dir
		cmd.Env = append(os.Environ(), "DEBIAN_FRONTEND=noninteractive")
		return cmd.CombinedOutput()
	}
	out, err := run(args...)
	if err == nil || ctx.Err() != nil {
		return err
	}
	if out, err := run("update"); err != nil {
		return fmt.Errorf("apt-get update: %w\n%s", err, lastLines(out, 10))
	}
	if out, err = run(args...); err != nil {
		return fmt.Errorf("apt-get %s: %w\n%s", strings.Join(args, " "), err, lastLines(out, 10))
	}
	return nil
}

// lastLines is the end of a program's output, for an error message.
func lastLines(out []byte, n int) string {
	lines := strings.Split(strings.TrimRight(string(out), "\n"), "\n")
	return strings.Join(lines[max(0, len(lines)-n):], "\n")
}
