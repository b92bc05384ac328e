// SPDX-License-Identifier: Apache-2.0

package node

import (
	"crypto/md5"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/lash-net/lash/sandbox/cgroup"
)

// sysctls that kubelet sets for the whole machine unless they read as it wants: inside a node, files
// with the wanted values lie over them, so that nothing changes outside.
var sysctls = map[string]string{
	"vm/overcommit_memory":      "1",
	"vm/panic_on_oom":           "0",
	"kernel/panic":              "10",
	"kernel/panic_on_oops":      "1",
	"kernel/keys/root_maxkeys":  "1000000",
	"kernel/keys/root_maxbytes": "25000000",
}

// Init is a node's process 1, in namespaces of its own: it makes the node's view of the machine, then
// keeps the node's daemons running. When it dies the kernel ends everything in the node.
func Init(dir string, log *slog.Logger) error {
	s, err := Load(dir)
	if err != nil {
		return err
	}
	layout, err := cgroup.Detect()
	if err != nil {
		return err
	}
	if err := s.root(layout); err != nil {
		return fmt.Errorf("root file system of %s: %w", s.Name, err)
	}
	if err := s.settings(); err != nil {
		return fmt.Errorf("settings of %s: %w", s.Name, err)
	}
	return s.supervise(log)
}

// root builds the node's root: the machine's own, copy on write in memory, with file systems of the
// node's own where Kubernetes writes. Nothing of the machine's /run, /proc, /sys and /tmp stays
// mounted, so that a node never keeps alive a namespace that somebody else removes.
func (s Spec) root(layout *cgroup.Layout) error {
	host, err := hostMounts()
	if err != nil {
		return err
	}
	root, scratch := filepath.Join(s.Dir, "root"), filepath.Join(s.Dir, "scratch")
	if err := errors.Join(
		mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""),
		mkdir(root), mkdir(scratch),
		mount("tmpfs", scratch, "tmpfs", 0, "mode=755"),
		mkdir(scratch+"/upper"), mkdir(scratch+"/work"),
	); err != nil {
		return err
	}
	if err := mount("overlay", root, "overlay", 0, "lowerdir=/,upperdir="+scratch+"/upper,workdir="+scratch+"/work"); err != nil {
		return fmt.Errorf("%w (the kernel needs overlayfs)", err)
	}
	for _, m := range host {
		if st, err := os.Stat(m); err == nil && !st.IsDir() {
			continue
		}
		if err := mount(m, root+m, "", unix.MS_BIND, ""); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	if err := errors.Join(
		mount("proc", root+"/proc", "proc", 0, ""),
		mount("sysfs", root+"/sys", "sysfs", 0, ""),
		mount("/dev", root+"/dev", "", unix.MS_BIND|unix.MS_REC, ""),
		mount("run", root+"/run", "tmpfs", 0, "mode=755"),
		mount("tmp", root+"/tmp", "tmpfs", 0, "mode=1777"),
		mount("bpf", root+"/sys/fs/bpf", "bpf", 0, ""),
	); err != nil {
		return err
	}
	// for tracing only, absent on some kernels
	_ = mount("tracefs", root+"/sys/kernel/tracing", "tracefs", 0, "")
	_ = mount("debugfs", root+"/sys/kernel/debug", "debugfs", 0, "")
	if err := mountCgroups(layout, root); err != nil {
		return err
	}
	for _, d := range []string{"/run/netns", "/run/lock"} {
		if err := mkdir(root + d); err != nil {
			return err
		}
	}
	for _, d := range Kept {
		if err := errors.Join(mkdir(root+d), mount(s.Dir+d, root+d, "", unix.MS_BIND, "")); err != nil {
			return err
		}
	}
	sum := md5.Sum([]byte(s.Dir))
	for f, data := range map[string]string{
		"/etc/hostname":    s.Name + "\n",
		"/etc/machine-id":  hex.EncodeToString(sum[:]) + "\n",
		"/etc/resolv.conf": "",
		"/etc/hosts":       fmt.Sprintf("127.0.0.1 localhost\n::1 localhost\n%s %s\n%s %s\n%s cp\n", s.IP4, s.Name, s.IP6, s.Name, s.APIHost),
	} {
		_ = os.Remove(root + f) // it may be a link into /run
		if err := os.WriteFile(root+f, []byte(data), 0o644); err != nil {
			return err
		}
	}
	old := root + "/run/old"
	if err := errors.Join(mkdir(old), unix.PivotRoot(root, old), unix.Chdir("/")); err != nil {
		return fmt.Errorf("pivot: %w", err)
	}
	if err := errors.Join(unix.Unmount("/run/old", unix.MNT_DETACH), os.Remove("/run/old")); err != nil {
		return fmt.Errorf("leave the machine's mounts: %w", err)
	}
	return nil
}

// hostMounts lists the machine's disk-like mounts below /, in order: an overlay shows only its own file system.
func hostMounts() ([]string, error) {
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	return diskMounts(string(b)), nil
}

func diskMounts(mountinfo string) []string {
	var list []string
	for line := range strings.Lines(mountinfo) {
		pre, post, ok := strings.Cut(line, " - ")
		f, g := strings.Fields(pre), strings.Fields(post)
		if !ok || len(f) < 5 || len(g) < 1 {
			continue
		}
		m := strings.ReplaceAll(f[4], `\040`, " ")
		switch g[0] {
		case "proc", "sysfs", "cgroup", "cgroup2", "nsfs", "bpf", "devtmpfs", "devpts", "mqueue", "debugfs", "tracefs", "securityfs", "fusectl", "configfs", "autofs", "binfmt_misc", "hugetlbfs", "pstore", "efivarfs", "overlay":
			continue
		}
		skip := m == "/"
		for _, d := range []string{"/proc", "/sys", "/dev", "/run", "/tmp", "/var/run", "/var/lib/lash-sandbox", "/var/lib/containerd", "/var/lib/docker", "/var/lib/kubelet"} {
			skip = skip || m == d || strings.HasPrefix(m, d+"/")
		}
		if !skip {
			list = append(list, m)
		}
	}
	return list
}

func mountCgroups(layout *cgroup.Layout, root string) error {
	top := root + cgroup.Root
	if layout.Unified {
		if err := mount("cgroup2", top, "cgroup2", 0, ""); err != nil {
			return err
		}
		// daemons live in a child, so that the root may pass controllers down to pods
		if err := errors.Join(mkdir(filepath.Join(top, cgroup.System)),
			os.WriteFile(filepath.Join(top, cgroup.System, "cgroup.procs"), []byte("0"), 0)); err != nil {
			return err
		}
		return layout.EnableAllAt(top)
	}
	if err := mount("cgroup", top, "tmpfs", 0, "mode=755"); err != nil {
		return err
	}
	for _, h := range layout.Hierarchies {
		name := path.Base(h.Mount)
		dir, kind := filepath.Join(top, name), "cgroup"
		if h.V2 {
			kind = "cgroup2"
		}
		if err := errors.Join(mkdir(dir), mount(kind, dir, kind, 0, h.Options)); err != nil {
			return err
		}
		if parts := strings.Split(name, ","); len(parts) > 1 {
			for _, p := range parts {
				if err := os.Symlink(name, filepath.Join(top, p)); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

// settings are what a distribution's boot scripts and kubeadm's documentation would set.
func (s Spec) settings() error {
	if err := errors.Join(mkdir("/run/sandbox/sysctl"), unix.Sethostname([]byte(s.Name))); err != nil {
		return err
	}
	for key, val := range sysctls {
		f := "/run/sandbox/sysctl/" + strings.ReplaceAll(key, "/", "_")
		if err := os.WriteFile(f, []byte(val+"\n"), 0o644); err != nil {
			return err
		}
		if err := mount(f, "/proc/sys/"+key, "", unix.MS_BIND, ""); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	// each boot has its own number, by which Kubernetes sees that the node was restarted
	boot, err := os.ReadFile("/proc/sys/kernel/random/uuid")
	if err != nil {
		return err
	}
	if err := errors.Join(os.WriteFile("/run/sandbox/boot_id", boot, 0o644),
		os.WriteFile("/etc/kubernetes/boot_id", boot, 0o644),
		mount("/run/sandbox/boot_id", "/proc/sys/kernel/random/boot_id", "", unix.MS_BIND, "")); err != nil {
		return err
	}
	for key, val := range map[string]string{"net/ipv4/ip_forward": "1", "net/ipv6/conf/all/forwarding": "1"} {
		if err := os.WriteFile("/proc/sys/"+key, []byte(val), 0); err != nil {
			return err
		}
	}
	var lim unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &lim); err == nil {
		lim.Cur = lim.Max
		_ = unix.Setrlimit(unix.RLIMIT_NOFILE, &lim)
	}
	return mount("", "/", "", unix.MS_REC|unix.MS_SHARED, "")
}

func mount(source, target, kind string, flags uintptr, data string) error {
	if err := unix.Mount(source, target, kind, flags, data); err != nil {
		return &fs.PathError{Op: "mount " + kind, Path: target, Err: err}
	}
	return nil
}

func mkdir(p string) error { return os.MkdirAll(p, 0o755) }
