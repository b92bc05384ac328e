// SPDX-License-Identifier: Apache-2.0

// Command vm runs commands and test binaries on other kernels.
//
// It boots a Debian cloud kernel under qemu's software emulation on a
// copy-on-write view of this machine's root file system, runs the command as
// root, and hands back its output and exit status. Nothing the command writes
// reaches the host, except below a directory given with -rw.
//
// The program is its own guest: the initial RAM disk holds this binary as
// /init and the few modules that mount the root, so nothing but qemu, its
// virtiofsd and kmod is needed on the host.
//
// It owns /var/cache/lash-vm (kernels, unpacked once) and, while it runs,
// one temporary directory and the processes it started. It reads the apt
// archive when a kernel or a tool is missing.
package main
