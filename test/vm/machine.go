// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// Machine boots one kernel and runs the steps of one spec in it.
type Machine struct {
	Kernel  Kernel
	Memory  string // as qemu writes it: 2G
	CPUs    int
	Append  string // further kernel parameters
	Console string // file that keeps the guest's console; none if empty
	Boot    time.Duration
	Output  io.Writer
	Event   func(Event) // called for every event, in order
}

var errDied = errors.New("the machine ended before its last command did")

// Run boots, runs every step, and takes everything down again. It returns nil
// when all steps ran, whatever their status; that arrives with the events.
// Cancelling ctx ends the machine at once.
func (m *Machine) Run(ctx context.Context, spec Spec) (err error) {
	sweepRuns()
	dir, release, err := newRunDir()
	if err != nil {
		return err
	}
	defer release()
	initrd := filepath.Join(dir, "initrd")
	if err := writeInitrd(initrd, m.Kernel, spec); err != nil {
		return fmt.Errorf("initial RAM disk: %w", err)
	}
	frames, guestEnd, err := os.Pipe()
	if err != nil {
		return err
	}
	defer frames.Close()
	defer guestEnd.Close()

	var procs processes
	defer procs.stop()
	console := filepath.Join(dir, "console")
	if m.Console != "" {
		defer func() { err = errors.Join(err, copyFile(m.Console, console)) }()
	}
	args := m.qemuArgs(initrd, console)
	for _, s := range spec.Shares {
		socket, err := startShare(ctx, &procs, dir, s)
		if err != nil {
			return err
		}
		args = append(args, "-chardev", "socket,id="+s.Tag+",path="+socket,
			"-device", "vhost-user-fs-pci,chardev="+s.Tag+",tag="+s.Tag)
	}
	qemu, err := procs.start(filepath.Join(dir, "qemu.log"), program{name: "qemu-system-x86_64", args: args, files: []*os.File{guestEnd}})
	if err != nil {
		return err
	}
	guestEnd.Close() // qemu holds the only other end now: its exit is our end of file

	qemuEnded, up, finished := qemu.ended, make(chan struct{}), make(chan error, 2)
	go func() {
		done := false
		err := readFrames(frames, func(p []byte) { m.Output.Write(p) }, func(e Event) {
			switch e.Kind {
			case "up":
				close(up)
			case "done":
				done = true
			}
			m.Event(e)
			if e.Kind == "done" {
				finished <- nil
			}
		})
		if !done {
			finished <- errors.Join(err, errDied)
		}
	}()

	boot := time.NewTimer(m.Boot)
	defer boot.Stop()
	limit := time.NewTimer(m.Boot + totalTimeout(spec.Steps))
	defer limit.Stop()
	fail := func(err error) error {
		return fmt.Errorf("%w\n%s", err, m.postMortem(dir))
	}
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-up:
			up = nil
			boot.Stop()
		case <-boot.C:
			return fail(fmt.Errorf("the machine did not boot within %s", m.Boot))
		case <-limit.C:
			return fail(fmt.Errorf("the machine did not end within its commands' timeouts"))
		case err := <-finished:
			if err != nil {
				return fail(err)
			}
			return nil
		case <-qemuEnded:
			// Frames may still be on their way: the reader meets their end.
			qemuEnded = nil
		}
	}
}

// totalTimeout leaves the guest time to end a step by itself and to say so.
func totalTimeout(steps []Step) time.Duration {
	total := time.Minute
	for _, s := range steps {
		total += s.Timeout + 30*time.Second
	}
	return total
}

func (m *Machine) qemuArgs(initrd, console string) []string {
	kernelArgs := "console=ttyS0 quiet loglevel=4 panic=-1 oops=panic mitigations=off tsc=reliable no_timer_check " +
		"random.trust_cpu=on audit=0 cryptomgr.notests=1 selinux=0 apparmor=0 rcupdate.rcu_expedited=1 cgroup_no_v1=all " +
		"rdinit=/init"
	if m.Append != "" {
		kernelArgs += " " + m.Append
	}
	return []string{
		"-accel", "tcg,thread=multi", "-cpu", "max",
		"-machine", "q35,memory-backend=mem,hpet=off",
		"-object", "memory-backend-memfd,id=mem,size=" + m.Memory + ",share=on",
		"-m", m.Memory, "-smp", fmt.Sprint(m.CPUs),
		"-nodefaults", "-no-user-config", "-display", "none", "-nic", "none", "-no-reboot",
		"-kernel", m.Kernel.Image, "-initrd", initrd, "-append", kernelArgs,
		"-chardev", "file,id=console,path=" + console, "-serial", "chardev:console",
		"-device", "virtio-serial-pci",
		"-chardev", "file,id=frames,append=on,path=/dev/fdset/1", "-add-fd", "fd=3,set=1",
		"-device", "virtserialport,chardev=frames,name=" + portName,
	}
}

// postMortem is what the host saw of a machine that failed.
func (m *Machine) postMortem(dir string) string {
	var b strings.Builder
	logs, _ := filepath.Glob(filepath.Join(dir, "*.log"))
	for _, name := range append(logs, filepath.Join(dir, "console")) {
		if text, _ := os.ReadFile(name); len(bytes.TrimSpace(text)) > 0 {
			fmt.Fprintf(&b, "--- %s\n%s\n", filepath.Base(name), lastLines(text, 60))
		}
	}
	return b.String()
}

// startShare starts the daemon of one share and waits for its socket.
func startShare(ctx context.Context, procs *processes, dir string, s Share) (socket string, err error) {
	daemon, err := findVirtiofsd()
	if err != nil {
		return "", err
	}
	at := filepath.Join(dir, "mnt-"+s.Tag)
	if err := os.Mkdir(at, 0o700); err != nil {
		return "", err
	}
	socket = filepath.Join(dir, s.Tag+".sock")
	mode := "ro"
	if s.Writable {
		mode = "rw"
	}
	log := filepath.Join(dir, "virtiofsd-"+s.Tag+".log")
	self, err := os.Executable()
	if err != nil {
		return "", err
	}
	p, err := procs.start(log, program{name: self, args: []string{shareFlag, s.Dir, at, mode, daemon, socket}, unshare: syscall.CLONE_NEWNS})
	if err != nil {
		return "", err
	}
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	limit := time.After(20 * time.Second)
	for !exists(socket) {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return "", ctx.Err()
		case <-p.ended:
			text, _ := os.ReadFile(log)
			return "", fmt.Errorf("share %s: virtiofsd ended\n%s", s.Dir, lastLines(text, 10))
		case <-limit:
			return "", fmt.Errorf("share %s: virtiofsd made no socket in 20 s", s.Dir)
		}
	}
	return socket, nil
}

// writeInitrd makes the RAM disk: this program as /init, the modules that mount
// the root, and the spec.
func writeInitrd(path string, k Kernel, spec Spec) error {
	self, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		return err
	}
	dep, err := os.ReadFile(filepath.Join(k.ModDir, "modules.dep"))
	if err != nil {
		return err
	}
	builtin, err := os.ReadFile(filepath.Join(k.ModDir, "modules.builtin"))
	if err != nil {
		return err
	}
	files, err := loadOrder(string(dep), string(builtin), bootModules)
	if err != nil {
		return err
	}
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	defer f.Close()
	c := &cpioWriter{w: f}
	for _, dir := range []string{"proc", "sys", "dev", "modules", "shares", "upper", "new"} {
		c.Add(dir, cpioDir, nil)
	}
	c.Add("init", cpioExec, self)
	for _, file := range files {
		data, err := os.ReadFile(filepath.Join(k.ModDir, file))
		if err != nil {
			return err
		}
		name := filepath.Base(file)
		spec.Modules = append(spec.Modules, name)
		c.Add("modules/"+name, cpioFile, data)
	}
	text, err := json.Marshal(spec)
	if err != nil {
		return err
	}
	c.Add("spec.json", cpioFile, text)
	return c.Close()
}

// processes are the programs of one run; stop ends them, last started first.
type processes struct{ list []*process }

type process struct {
	cmd   *exec.Cmd
	ended chan struct{}
}

type program struct {
	name    string
	args    []string
	files   []*os.File // from descriptor 3 on
	unshare uintptr
}

// start runs a program that dies with this one at the latest: the parent-death
// signal belongs to the calling thread, so main locks itself to its own.
func (ps *processes) start(log string, p program) (*process, error) {
	f, err := os.Create(log)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	cmd := exec.Command(p.name, p.args...)
	cmd.Stdout, cmd.Stderr, cmd.ExtraFiles = f, f, p.files
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Pdeathsig:    syscall.SIGKILL,
		Setpgid:      true, // a Ctrl-C at the terminal is ours alone to handle
		Unshareflags: p.unshare,
	}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("start %s: %w", p.name, err)
	}
	started := &process{cmd, make(chan struct{})}
	go func() {
		cmd.Wait()
		close(started.ended)
	}()
	ps.list = append(ps.list, started)
	return started, nil
}

func (ps *processes) stop() {
	for i := len(ps.list) - 1; i >= 0; i-- {
		p := ps.list[i]
		syscall.Kill(-p.cmd.Process.Pid, syscall.SIGKILL)
		<-p.ended
	}
}

const runPattern = "lash-vm-"

// newRunDir makes the run's folder, holding a lock in it for sweepRuns.
func newRunDir() (dir string, release func(), err error) {
	dir, err = os.MkdirTemp("", runPattern)
	if err != nil {
		return "", nil, err
	}
	f, err := os.Create(filepath.Join(dir, "lock.new"))
	if err == nil {
		err = syscall.Flock(int(f.Fd()), syscall.LOCK_EX)
	}
	if err == nil {
		err = os.Rename(f.Name(), filepath.Join(dir, "lock"))
	}
	if err != nil {
		os.RemoveAll(dir)
		return "", nil, err
	}
	return dir, func() { os.RemoveAll(dir); f.Close() }, nil
}

// sweepRuns removes the folders of runs that were killed.
func sweepRuns() {
	locks, _ := filepath.Glob(filepath.Join(os.TempDir(), runPattern+"*", "lock"))
	for _, lock := range locks {
		f, err := os.Open(lock)
		if err != nil {
			continue
		}
		if syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB) == nil {
			os.RemoveAll(filepath.Dir(lock))
		}
		f.Close()
	}
}

func copyFile(to, from string) error {
	b, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	return os.WriteFile(to, b, 0o644)
}
