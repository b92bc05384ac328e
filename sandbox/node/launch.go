// SPDX-License-Identifier: Apache-2.0

package node

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"runtime"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/lash-net/lash/sandbox/cgroup"
	"github.com/lash-net/lash/sandbox/proc"
)

// Hidden subcommands of the program itself: it executes itself as the first process of what it starts.
const (
	LaunchCommand = "__launch"
	InitCommand   = "__node-init"
)

// Launch says where a process is to run. The caller starts the program itself with LaunchCommand, already
// in the cgroup2 cgroup; that process joins the rest and then becomes Argv, or starts a node's process 1.
type Launch struct {
	Cgroup  string
	Netns   string // path; empty: the caller's
	Pidfile string
	Argv    []string
	NodeDir string // set: start process 1 of this node instead of Argv
}

// Start starts l with its output appended to log and returns when the pidfile names the process.
func (l Launch) Start(layout *cgroup.Layout, log string) error {
	if err := layout.Create(l.Cgroup); err != nil {
		return err
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	out, err := os.OpenFile(log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	defer out.Close()
	cg, err := os.Open(layout.V2(l.Cgroup))
	if err != nil {
		return err
	}
	defer cg.Close()
	arg, err := json.Marshal(l)
	if err != nil {
		return err
	}
	// the pipe closes on exec: end of file means launched, anything before is an error
	r, w, err := os.Pipe()
	if err != nil {
		return err
	}
	defer r.Close()
	cmd := exec.Command(self, LaunchCommand, string(arg))
	cmd.Stdout, cmd.Stderr = out, out
	cmd.ExtraFiles = []*os.File{w}
	cmd.Dir = "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, UseCgroupFD: true, CgroupFD: int(cg.Fd())}
	err = cmd.Start()
	w.Close()
	if err != nil {
		return fmt.Errorf("launch: %w", err)
	}
	go func() { _ = cmd.Wait() }() // reap it, should it end while we live
	buf := make([]byte, 4096)
	n, _ := r.Read(buf)
	if n > 0 {
		return errors.New(string(buf[:n]))
	}
	return nil
}

// RunLaunch is LaunchCommand. It returns only on failure, which it also reports on descriptor 3.
func RunLaunch(arg string) error {
	report := os.NewFile(3, "report")
	syscall.CloseOnExec(3)
	err := launch(arg)
	if err != nil && report != nil {
		_, _ = report.WriteString(err.Error())
	}
	return err
}

func launch(arg string) error {
	var l Launch
	if err := json.Unmarshal([]byte(arg), &l); err != nil {
		return err
	}
	layout, err := cgroup.Detect()
	if err != nil {
		return err
	}
	if err := layout.Join(l.Cgroup); err != nil {
		return err
	}
	runtime.LockOSThread()
	if l.Netns != "" {
		if err := setns(l.Netns, unix.CLONE_NEWNET); err != nil {
			return err
		}
	}
	if l.NodeDir != "" {
		return startInit(l)
	}
	self, err := proc.Of(os.Getpid())
	if err != nil {
		return err
	}
	if err := self.Write(l.Pidfile); err != nil {
		return err
	}
	path, err := exec.LookPath(l.Argv[0])
	if err != nil {
		return err
	}
	return syscall.Exec(path, l.Argv, os.Environ())
}

func startInit(l Launch) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	cmd := exec.Command(self, InitCommand, l.NodeDir)
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	cmd.Dir = "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Setsid: true,
		// the cgroup namespace makes the cgroups that we are in now the node's roots
		Cloneflags: unix.CLONE_NEWNS | unix.CLONE_NEWUTS | unix.CLONE_NEWIPC | unix.CLONE_NEWPID | unix.CLONE_NEWCGROUP,
	}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start the node's process 1: %w", err)
	}
	ref, err := proc.Of(cmd.Process.Pid)
	if err != nil {
		return err
	}
	if err := ref.Write(l.Pidfile); err != nil {
		return err
	}
	os.Exit(0)
	return nil
}

func setns(path string, kind int) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := unix.Setns(int(f.Fd()), kind); err != nil {
		return fmt.Errorf("enter %s: %w", path, err)
	}
	return nil
}

// Target is where Enter runs a command.
type Target struct {
	Cgroup string
	Init   proc.Ref // process 1 of a node: all of its namespaces are entered
	Netns  string   // else: this network namespace only
}

// Enter runs argv inside the target with this process's input and output, and returns its exit status.
// The calling goroutine's thread is not usable afterwards.
func (t Target) Enter(argv []string, env []string) (int, error) {
	layout, err := cgroup.Detect()
	if err != nil {
		return 0, err
	}
	if err := layout.Join(t.Cgroup); err != nil {
		return 0, err
	}
	runtime.LockOSThread()
	if t.Init.Pid != 0 {
		fd, err := unix.PidfdOpen(t.Init.Pid, 0)
		if err != nil {
			return 0, fmt.Errorf("open process %d: %w", t.Init.Pid, err)
		}
		if !t.Init.Alive() {
			return 0, errors.New("the node has stopped")
		}
		if err := unix.Unshare(unix.CLONE_FS); err != nil { // a mount namespace needs a root of the thread's own
			return 0, fmt.Errorf("unshare: %w", err)
		}
		if err := unix.Setns(fd, unix.CLONE_NEWNS|unix.CLONE_NEWUTS|unix.CLONE_NEWIPC|unix.CLONE_NEWNET|unix.CLONE_NEWPID|unix.CLONE_NEWCGROUP); err != nil {
			return 0, fmt.Errorf("enter the node's namespaces: %w", err)
		}
	} else if err := setns(t.Netns, unix.CLONE_NEWNET); err != nil {
		return 0, err
	}
	cmd := exec.Command(argv[0], argv[1:]...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.Env = env
	signals := make(chan os.Signal, 4)
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGQUIT)
	if err := cmd.Start(); err != nil {
		return 127, err
	}
	go func() {
		for s := range signals {
			if s != syscall.SIGINT && s != syscall.SIGQUIT { // the terminal sends these to both
				_ = cmd.Process.Signal(s)
			}
		}
	}()
	err = cmd.Wait()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		if ws, ok := exit.Sys().(syscall.WaitStatus); ok && ws.Signaled() {
			return 128 + int(ws.Signal()), nil
		}
		return exit.ExitCode(), nil
	}
	return 0, err
}
