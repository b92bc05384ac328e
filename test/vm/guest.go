// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"
	"unsafe"
)

// guestMain is PID 1 of the guest: it makes the host's view the root, starts a
// child that runs the steps, reaps orphans until the child ends, and powers off.
func guestMain() {
	defer powerOff()
	spec, err := guestRoot()
	if err == nil {
		err = guestMounts(spec)
	}
	if err == nil {
		err = superviseSteps()
	}
	if err != nil {
		fmt.Println("vm guest:", err)
	}
}

func powerOff() {
	syscall.Sync()
	syscall.Reboot(syscall.LINUX_REBOOT_CMD_POWER_OFF)
}

// guestRoot loads the modules, mounts the shares read-only below overlays in
// memory, and enters them.
func guestRoot() (Spec, error) {
	var spec Spec
	text, err := os.ReadFile("/spec.json")
	if err != nil {
		return spec, err
	}
	if err := json.Unmarshal(text, &spec); err != nil {
		return spec, fmt.Errorf("spec.json: %w", err)
	}
	for _, m := range []mount{{"proc", "/proc", "proc", 0, ""}, {"sysfs", "/sys", "sysfs", 0, ""}, {"devtmpfs", "/dev", "devtmpfs", 0, ""}} {
		if err := m.do(); err != nil {
			return spec, err
		}
	}
	for _, name := range spec.Modules {
		if err := loadModule("/modules/" + name); err != nil {
			return spec, fmt.Errorf("load module %s: %w", name, err)
		}
	}
	if err := (mount{"upper", "/upper", "tmpfs", 0, "size=75%"}).do(); err != nil {
		return spec, err
	}
	for _, s := range spec.Shares {
		if err := mountShare(s); err != nil {
			return spec, err
		}
	}
	modules := filepath.Join("/new/lib/modules", spec.Release)
	if err := os.MkdirAll(modules, 0o755); err != nil {
		return spec, err
	}
	if err := (mount{filepath.Join("/new", spec.ModDir), modules, "", syscall.MS_BIND, ""}).do(); err != nil {
		return spec, err
	}
	for _, dir := range []string{"/proc", "/sys", "/dev"} {
		if err := (mount{dir, "/new" + dir, "", syscall.MS_MOVE, ""}).do(); err != nil {
			return spec, err
		}
	}
	if err := os.Chdir("/new"); err != nil {
		return spec, err
	}
	if err := (mount{".", "/", "", syscall.MS_MOVE, ""}).do(); err != nil {
		return spec, err
	}
	if err := syscall.Chroot("."); err != nil {
		return spec, err
	}
	return spec, os.Chdir("/")
}

// mountShare mounts a share at its place below /new; what is not writable gets
// an overlay, so that the guest may write and the host keeps its files.
func mountShare(s Share) error {
	at := filepath.Join("/new", s.Dir)
	if err := os.MkdirAll(at, 0o755); err != nil {
		return err
	}
	if s.Writable {
		return mount{s.Tag, at, "virtiofs", 0, ""}.do()
	}
	lower, upper, work := "/shares/"+s.Tag, "/upper/"+s.Tag, "/upper/"+s.Tag+".work"
	for _, dir := range []string{lower, upper, work} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
	}
	if err := (mount{s.Tag, lower, "virtiofs", syscall.MS_RDONLY, ""}).do(); err != nil {
		return err
	}
	return mount{"overlay", at, "overlay", 0, "lowerdir=" + lower + ",upperdir=" + upper + ",workdir=" + work}.do()
}

// guestMounts is what a booted Linux has: the file systems that tests use, the
// loopback device, limits.
func guestMounts(spec Spec) error {
	for _, dir := range []string{"/dev/pts", "/dev/shm", "/dev/net", "/sys/fs/cgroup", "/sys/fs/bpf", "/run"} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
	}
	for _, m := range []mount{
		{"devpts", "/dev/pts", "devpts", 0, ""},
		{"shm", "/dev/shm", "tmpfs", 0, ""},
		{"run", "/run", "tmpfs", 0, "mode=755"},
		{"cgroup2", "/sys/fs/cgroup", "cgroup2", 0, ""},
		{"bpf", "/sys/fs/bpf", "bpf", 0, ""},
		{"debugfs", "/sys/kernel/debug", "debugfs", 0, ""},
		{"tracefs", "/sys/kernel/tracing", "tracefs", 0, ""},
	} {
		if err := m.do(); err != nil {
			return err
		}
	}
	for link, target := range map[string]string{"fd": "", "stdin": "/0", "stdout": "/1", "stderr": "/2"} {
		os.Symlink("/proc/self/fd"+target, "/dev/"+link)
	}
	if !exists("/dev/net/tun") {
		syscall.Mknod("/dev/net/tun", syscall.S_IFCHR|0o666, 10<<8|200) // opening it loads the module
	}
	os.MkdirAll("/run/netns", 0o755)
	os.MkdirAll("/run/lock", 0o755)
	controllers, _ := os.ReadFile("/sys/fs/cgroup/cgroup.controllers")
	for _, c := range strings.Fields(string(controllers)) {
		os.WriteFile("/sys/fs/cgroup/cgroup.subtree_control", []byte("+"+c), 0o644)
	}
	if err := syscall.Sethostname([]byte(spec.Hostname)); err != nil {
		return fmt.Errorf("hostname: %w", err)
	}
	for resource, n := range map[int]uint64{syscall.RLIMIT_NOFILE: 65536, rlimitMemlock: ^uint64(0)} {
		if err := syscall.Setrlimit(resource, &syscall.Rlimit{Cur: n, Max: n}); err != nil {
			return fmt.Errorf("limit %d: %w", resource, err)
		}
	}
	text, err := json.Marshal(spec)
	if err != nil {
		return err
	}
	if err := os.WriteFile(guestSpec, text, 0o644); err != nil {
		return err
	}
	return loopbackUp()
}

// guestSpec hands the spec from PID 1 to the runner of the steps, beyond the
// RAM disk that is out of sight by then.
const guestSpec = "/run/lash-vm.json"

const rlimitMemlock = 8 // RLIMIT_MEMLOCK, which package syscall leaves out

// loopbackUp sets IFF_UP on lo, as every booted system has it.
func loopbackUp() error {
	fd, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_DGRAM, 0)
	if err != nil {
		return err
	}
	defer syscall.Close(fd)
	var request struct {
		name  [syscall.IFNAMSIZ]byte
		flags uint16
		_     [22]byte
	}
	copy(request.name[:], "lo")
	request.flags = syscall.IFF_UP | syscall.IFF_RUNNING
	if _, _, errno := syscall.Syscall(syscall.SYS_IOCTL, uintptr(fd), syscall.SIOCSIFFLAGS, uintptr(unsafe.Pointer(&request))); errno != 0 {
		return fmt.Errorf("set lo up: %w", errno)
	}
	return nil
}

type mount struct {
	source, target, fstype string
	flags                  uintptr
	data                   string
}

func (m mount) do() error {
	if err := syscall.Mount(m.source, m.target, m.fstype, m.flags, m.data); err != nil {
		return fmt.Errorf("mount %s %s at %s: %w", m.fstype, m.source, m.target, err)
	}
	return nil
}

func loadModule(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	none := [1]byte{}
	const finitModule = 313 // x86-64
	_, _, errno := syscall.Syscall(finitModule, f.Fd(), uintptr(unsafe.Pointer(&none[0])), 0)
	if errno != 0 && errno != syscall.EEXIST {
		return errno
	}
	return nil
}

// superviseSteps starts this program again as the one that runs the steps. PID 1
// itself only reaps: a waiting exec.Cmd would lose its child to the reaper.
func superviseSteps() error {
	attr := &syscall.ProcAttr{Env: os.Environ(), Files: []uintptr{0, 1, 2}}
	child, err := syscall.ForkExec("/proc/self/exe", []string{"vm", stepsFlag}, attr)
	if err != nil {
		return fmt.Errorf("start the runner of steps: %w", err)
	}
	for {
		var status syscall.WaitStatus
		pid, err := syscall.Wait4(-1, &status, 0, nil)
		if err == syscall.EINTR {
			continue
		}
		if err != nil {
			return err
		}
		if pid == child {
			return nil
		}
	}
}

// stepsMain runs the spec's steps, telling the host by frames.
func stepsMain() error {
	runtime.LockOSThread()
	port, err := openPort()
	if err != nil {
		return err
	}
	defer port.Close()
	out := &frameWriter{w: port}
	var spec Spec
	text, err := os.ReadFile(guestSpec)
	if err != nil {
		return errors.Join(err, out.Event(Event{Kind: "fail", Text: err.Error()}))
	}
	if err := json.Unmarshal(text, &spec); err != nil {
		return err
	}
	out.Event(Event{Kind: "up", Uptime: uptime()})
	for i, step := range spec.Steps {
		out.Event(Event{Kind: "start", Step: i, Uptime: uptime()})
		status, text := runStep(spec, step, out)
		out.Event(Event{Kind: "end", Step: i, Status: status, Uptime: uptime(), Text: text})
		// What a step left behind must not disturb the next: everything but PID 1 and us.
		syscall.Kill(-1, syscall.SIGKILL)
	}
	return out.Event(Event{Kind: "done", Uptime: uptime()})
}

// openPort finds the virtio port by its name; udev is not there to do it.
func openPort() (*os.File, error) {
	for range 500 {
		names, _ := filepath.Glob("/sys/class/virtio-ports/*/name")
		for _, n := range names {
			text, _ := os.ReadFile(n)
			if strings.TrimSpace(string(text)) == portName {
				return os.OpenFile("/dev/"+filepath.Base(filepath.Dir(n)), os.O_WRONLY, 0)
			}
		}
		time.Sleep(10 * time.Millisecond) // the device announces its ports when it likes
	}
	return nil, fmt.Errorf("no virtio port named %s", portName)
}

// runStep returns the status as a shell would, and a word on what else there is
// to know. Past its timeout a step gets SIGQUIT, which makes Go programs print
// their goroutines, then SIGKILL.
func runStep(spec Spec, step Step, out *frameWriter) (int, string) {
	ctx, cancel := context.WithTimeout(context.Background(), step.Timeout)
	defer cancel()
	path, err := lookPath(step.Argv[0], step.Dir)
	if err != nil {
		return 127, err.Error()
	}
	cmd := exec.CommandContext(ctx, path, step.Argv[1:]...)
	cmd.Args[0] = step.Argv[0]
	cmd.Dir = step.Dir
	cmd.Env = append([]string{"PATH=" + guestPath, "HOME=/root", "TERM=dumb", "LASH_VM=" + spec.Release, "PWD=" + step.Dir}, step.Env...)
	cmd.Stdout, cmd.Stderr = out, out
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGQUIT) }
	cmd.WaitDelay = 10 * time.Second
	err = cmd.Run()
	switch {
	case ctx.Err() != nil:
		return exitTimeout, "timeout after " + step.Timeout.String()
	case cmd.ProcessState == nil:
		return exitCannotRun, err.Error()
	}
	status := cmd.ProcessState.Sys().(syscall.WaitStatus)
	if status.Signaled() {
		return 128 + int(status.Signal()), status.Signal().String()
	}
	if errors.Is(err, exec.ErrWaitDelay) {
		return status.ExitStatus(), "left processes behind that held its output"
	}
	return status.ExitStatus(), ""
}

const guestPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// lookPath finds a program in the guest's PATH, or relative to the step's folder.
func lookPath(name, dir string) (string, error) {
	if strings.Contains(name, "/") {
		if !filepath.IsAbs(name) {
			name = filepath.Join(dir, name)
		}
		return name, nil
	}
	for _, d := range filepath.SplitList(guestPath) {
		if p := filepath.Join(d, name); executable(p) {
			return p, nil
		}
	}
	return "", fmt.Errorf("%s: command not found in %s", name, guestPath)
}

func uptime() float64 {
	text, _ := os.ReadFile("/proc/uptime")
	first, _, _ := strings.Cut(string(text), " ")
	s, _ := strconv.ParseFloat(first, 64)
	return s
}
