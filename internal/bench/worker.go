// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"runtime/debug"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// WorkerArg as first argument makes a program that embeds the bench its worker:
// main calls RunWorker then, and nothing else.
const WorkerArg = "bench-worker"

// realTimePriority is above every ordinary process and below nothing of ours.
const realTimePriority = 50

// order tells a worker one thing to do: to check an algorithm, to listen, to serve what it
// listens to, or to be a client.
type order struct {
	Do         string         `json:"do"` // "check", "listen", "serve", "drive"
	Kind       string         `json:"kind"`
	Addr       netip.AddrPort `json:"addr"`
	CPU        int            `json:"cpu"`
	Congestion string         `json:"congestion"`
	Warm       time.Duration  `json:"warm"`
	Duration   time.Duration  `json:"duration"`
}

type answer struct {
	Port     uint16 `json:"port,omitempty"`
	RealTime bool   `json:"realTime,omitempty"`
	Result   Result `json:"result"`
	Error    string `json:"error,omitempty"`
}

// RunWorker obeys orders from stdin, one JSON line each, until it ends. It is a
// process of its own so that neither a garbage collection nor another goroutine
// ever disturbs a measurement.
func RunWorker() error {
	runtime.LockOSThread()
	debug.SetGCPercent(-1)
	attr := unix.SchedAttr{Size: unix.SizeofSchedAttr, Policy: unix.SCHED_FIFO, Priority: realTimePriority}
	realTime := unix.SchedSetAttr(0, &attr, 0) == nil
	in := json.NewDecoder(bufio.NewReader(os.Stdin))
	out := json.NewEncoder(os.Stdout)
	listening := socket(-1)
	for {
		var o order
		if err := in.Decode(&o); err != nil {
			if errors.Is(err, io.EOF) {
				return nil
			}
			return err
		}
		a, err := obey(o, &listening)
		a.RealTime = realTime
		if err != nil {
			a.Error = err.Error()
		}
		if err := out.Encode(a); err != nil {
			return err
		}
	}
}

func obey(o order, listening *socket) (a answer, err error) {
	var set unix.CPUSet
	set.Set(o.CPU)
	if err := unix.SchedSetaffinity(0, &set); err != nil {
		return a, fmt.Errorf("pin to CPU %d: %w", o.CPU, err)
	}
	switch o.Do {
	case "check":
		var s socket
		if s, err = newSocket(o.Addr.Addr(), o.Congestion); err == nil {
			s.close()
		}
	case "listen":
		if o.Kind == Flood {
			*listening, a.Port, err = listenDatagrams(o.Addr.Addr())
			break
		}
		*listening, a.Port, err = listen(o.Addr.Addr(), o.Congestion)
	case "serve":
		a.Result, err = serve(o.Kind, *listening, o.Warm, o.Duration)
		listening.close()
	case "drive":
		a.Result, err = drive(o.Kind, o.Addr, o.Congestion, o.Warm, o.Duration)
	default:
		err = fmt.Errorf("unknown order %q", o.Do)
	}
	return a, err
}

// worker is the parent's handle of a worker process in one namespace.
type worker struct {
	cmd *exec.Cmd
	in  io.WriteCloser
	enc *json.Encoder
	dec *json.Decoder
}

// startWorker starts a worker in the namespace, and in the control group if there is one. It dies with the calling thread.
func startWorker(ns *Netns, group *os.File) (*worker, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	cmd := exec.Command(self, WorkerArg)
	cmd.Env = append(os.Environ(), "GOMAXPROCS=1", "GODEBUG=asyncpreemptoff=1")
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setpgid: true}
	if group != nil {
		cmd.SysProcAttr.UseCgroupFD, cmd.SysProcAttr.CgroupFD = true, int(group.Fd())
	}
	in, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := ns.Do(cmd.Start); err != nil {
		return nil, fmt.Errorf("start a worker in %s: %w", ns.Name, err)
	}
	return &worker{cmd, in, json.NewEncoder(in), json.NewDecoder(bufio.NewReader(out))}, nil
}

// tell sends an order; the answer is fetched by hear.
func (w *worker) tell(o order) error { return w.enc.Encode(o) }

func (w *worker) hear() (answer, error) {
	var a answer
	if err := w.dec.Decode(&a); err != nil {
		return a, fmt.Errorf("worker: %w", err)
	}
	if a.Error != "" {
		return a, errors.New(a.Error)
	}
	return a, nil
}

func (w *worker) stop() {
	w.in.Close()
	w.cmd.Process.Kill()
	w.cmd.Wait()
}
