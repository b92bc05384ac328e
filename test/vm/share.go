// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"syscall"
)

// mountPoints reads the mount points out of /proc/self/mountinfo.
func mountPoints(mountinfo string) []string {
	var dirs []string
	for line := range strings.Lines(mountinfo) {
		if f := strings.Fields(line); len(f) > 4 {
			dirs = append(dirs, unescapeMount(f[4]))
		}
	}
	return dirs
}

// unescapeMount undoes the octal escapes of blanks and backslashes.
func unescapeMount(s string) string {
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+3 < len(s) {
			if c, err := strconv.ParseUint(s[i+1:i+4], 8, 8); err == nil {
				b.WriteByte(byte(c))
				i += 3
				continue
			}
		}
		b.WriteByte(s[i])
	}
	return b.String()
}

// mountOf is the mount point that path, absolute and clean, lies below.
func mountOf(path string, points []string) string {
	best := "/"
	for _, p := range points {
		if (path == p || strings.HasPrefix(path, strings.TrimSuffix(p, "/")+"/")) && len(p) > len(best) {
			best = p
		}
	}
	return best
}

// sharesFor returns what the guest must mount to see the given paths: the root
// file system, which comes without the mounts below it, then those of them that
// hold a path. writable, unless empty, is one more share.
func sharesFor(paths []string, writable string, points []string) []Share {
	shares := []Share{{Tag: "root", Dir: "/"}}
	have := map[string]bool{"/": true}
	for _, p := range paths {
		if dir := mountOf(p, points); !have[dir] {
			have[dir] = true
			shares = append(shares, Share{Tag: fmt.Sprintf("share%d", len(shares)), Dir: dir})
		}
	}
	if writable != "" {
		shares = append(shares, Share{Tag: "writable", Dir: writable, Writable: true})
	}
	return shares
}

// shareMain is the hidden "-share-daemon" mode, run in a mount namespace of its
// own: it binds the directory without its submounts, read-only if so asked, and
// becomes virtiofsd. The mounts go with the process.
func shareMain(args []string) error {
	if len(args) != 5 {
		return fmt.Errorf("want DIR MOUNTPOINT ro|rw DAEMON SOCKET, got %q", args)
	}
	dir, at, mode, daemon, socket := args[0], args[1], args[2], args[3], args[4]
	if err := syscall.Mount("", "/", "", syscall.MS_REC|syscall.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	if err := syscall.Mount(dir, at, "", syscall.MS_BIND, ""); err != nil {
		return fmt.Errorf("bind %s to %s: %w", dir, at, err)
	}
	if mode == "ro" {
		if err := syscall.Mount("", at, "", syscall.MS_BIND|syscall.MS_REMOUNT|syscall.MS_RDONLY, ""); err != nil {
			return fmt.Errorf("make %s read-only: %w", at, err)
		}
	}
	argv := []string{daemon, "-f", "--socket-path=" + socket, "-o", "source=" + at,
		"-o", "cache=always", "-o", "log_level=err", "-o", "xattr", "--thread-pool-size=2"}
	return fmt.Errorf("execute %s: %w", daemon, syscall.Exec(daemon, argv, os.Environ()))
}
