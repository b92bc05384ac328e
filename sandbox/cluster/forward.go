// SPDX-License-Identifier: Apache-2.0

package cluster

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"runtime"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// RunForward is ForwardCommand: it carries TCP connections from an address of the machine to one inside
// a network namespace, so that programs outside reach the API server without a route to it.
func RunForward(listen, netns, to string) error {
	l, err := net.Listen("tcp", listen)
	if err != nil {
		return err
	}
	defer l.Close()
	dial, err := dialerIn(netns)
	if err != nil {
		return err
	}
	for {
		in, err := l.Accept()
		if errors.Is(err, net.ErrClosed) {
			return err
		}
		if err != nil {
			time.Sleep(10 * time.Millisecond) // out of descriptors, or the peer left already
			continue
		}
		go func() {
			defer in.Close()
			out, err := dial(to)
			if err != nil {
				return
			}
			defer out.Close()
			join(in, out)
		}()
	}
}

// dialerIn returns a dial function whose sockets belong to a network namespace. A socket belongs to the
// namespace of the thread that makes it, so one locked thread makes them all.
func dialerIn(netns string) (func(to string) (net.Conn, error), error) {
	type answer struct {
		conn net.Conn
		err  error
	}
	type request struct {
		to   string
		done chan answer
	}
	requests, ready := make(chan request), make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		f, err := os.Open(netns)
		if err == nil {
			err = unix.Setns(int(f.Fd()), unix.CLONE_NEWNET)
			f.Close()
		}
		if err != nil {
			ready <- fmt.Errorf("enter %s: %w", netns, err)
			return
		}
		ready <- nil
		for r := range requests {
			conn, err := net.DialTimeout("tcp", r.to, 2*time.Second)
			r.done <- answer{conn, err}
		}
	}()
	if err := <-ready; err != nil {
		return nil, err
	}
	return func(to string) (net.Conn, error) {
		r := request{to, make(chan answer, 1)}
		requests <- r
		a := <-r.done
		return a.conn, a.err
	}, nil
}

// join copies both ways and passes on each side's end.
func join(a, b net.Conn) {
	var wg sync.WaitGroup
	for _, p := range [][2]net.Conn{{a, b}, {b, a}} {
		wg.Add(1)
		go func() {
			defer wg.Done()
			_, _ = io.Copy(p[0], p[1])
			if t, ok := p[0].(*net.TCPConn); ok {
				_ = t.CloseWrite()
			}
		}()
	}
	wg.Wait()
}
