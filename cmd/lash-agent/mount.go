// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// mountBPF mounts the BPF file system at root if nobody has. In the agent's pod that mount appears on the node, where it
// outlives the agent, and with it the pinned maps and programs.
func mountBPF(root string) (mounted bool, err error) {
	var fs unix.Statfs_t
	if err := unix.Statfs(root, &fs); err == nil && fs.Type == unix.BPF_FS_MAGIC {
		return false, nil
	}
	if err := os.MkdirAll(root, 0o755); err != nil {
		return false, fmt.Errorf("bpf-root: %w", err)
	}
	if err := unix.Mount("bpf", root, "bpf", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC|unix.MS_RELATIME, "mode=0700"); err != nil {
		return false, fmt.Errorf("bpf-root: mount the BPF file system at %s: %w; mount it on the node: mount -t bpf bpf %[1]s", root, err)
	}
	return true, nil
}
