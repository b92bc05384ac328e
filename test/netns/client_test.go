// SPDX-License-Identifier: Apache-2.0

package netns

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// clientVariable makes the test binary a client.
const clientVariable = "LASH_TEST_CLIENT"

func TestMain(m *testing.M) {
	if os.Getenv(scenarioVariable) != "" {
		runScenario()
		return
	}
	if os.Getenv(clientVariable) != "" {
		runClient()
		return
	}
	os.Exit(m.Run())
}

// A client is a process in one network namespace and one control group that makes sockets as it is told: what a
// program attached to the group does happens to its sockets and to no other's.
type client struct {
	enc *json.Encoder
	dec *json.Decoder
}

// order is one thing to do; sockets have numbers.
type order struct {
	Do     string // "connect", "open", "send", "close", "bind"
	Net    string // "tcp" or "udp"
	Socket int
	V6     bool // an IPv6 socket, whatever the address: IPv4 by its mapped address
	To     netip.AddrPort
	Wait   time.Duration // for an answer; 0: two seconds
}

// answer tells what a socket's call did. Addresses are as the socket showed them, unmapped.
type answer struct {
	Socket int
	Said   string         // what the server said: its name, and the client's address as it saw it
	Peer   netip.AddrPort // getpeername, or where the datagram came from
	Local  netip.AddrPort
	Errno  syscall.Errno
}

// server is who answered.
func (a answer) server() string { name, _, _ := strings.Cut(a.Said, " "); return name }

// seen is the client's address as the server saw it.
func (a answer) seen() netip.Addr {
	_, seen, _ := strings.Cut(a.Said, " ")
	at, _ := netip.ParseAddrPort(strings.TrimSpace(seen))
	return at.Addr().Unmap()
}

// cgroup makes a control group and attaches the node's socket programs to it.
func (nd *node) cgroup(t *testing.T) *os.File {
	t.Helper()
	mount := t.TempDir()
	var group *os.File
	nd.do(t, "cgroup", func() error {
		if err := unix.Mount("none", mount, "cgroup2", 0, ""); err != nil { // in this thread's mount namespace only
			return fmt.Errorf("mount cgroup2: %w", err)
		}
		path := filepath.Join(mount, fmt.Sprintf("lash-test-%d-%s", os.Getpid(), filepath.Base(mount)+filepath.Base(filepath.Dir(mount))))
		if err := os.Mkdir(path, 0o755); err != nil {
			return err
		}
		t.Cleanup(func() {
			nd.do(t, "remove cgroup", func() error {
				group.Close()
				return errors.Join(nd.dp.DetachCgroup(), os.Remove(path))
			})
		})
		var err error
		if group, err = os.Open(path); err != nil {
			return err
		}
		return nd.dp.AttachCgroup(path)
	})
	return group
}

// newClient starts a client; it ends with the test.
func newClient(t *testing.T, ns, group *os.File) *client {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(self)
	// A socket with a timeout gives its call up at any signal (signal(7)), the runtime's own preemption among them.
	cmd.Env = append(os.Environ(), clientVariable+"=1", "GODEBUG=asyncpreemptoff=1")
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(group.Fd())}
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := inNS(ns, cmd.Start); err != nil {
		t.Fatalf("start a client: %v", err)
	}
	t.Cleanup(func() {
		in.Close() // which ends it
		cmd.Wait()
	})
	return &client{json.NewEncoder(in), json.NewDecoder(out)}
}

func (c *client) ask(t *testing.T, o order) answer {
	t.Helper()
	var a answer
	if err := c.enc.Encode(o); err != nil {
		t.Fatalf("client: %v", err)
	}
	if err := c.dec.Decode(&a); err != nil {
		t.Fatalf("client: %v", err)
	}
	return a
}

// connect asks for a connection and the server's word; it must succeed.
func (c *client) connect(t *testing.T, o order) answer {
	t.Helper()
	o.Do = "connect"
	a := c.ask(t, o)
	if a.Errno != 0 {
		t.Fatalf("connect to %s by %s: %v", o.To, o.Net, a.Errno)
	}
	c.ask(t, order{Do: "close", Socket: a.Socket})
	return a
}

// refused wants an errno of an order.
func (c *client) refused(t *testing.T, o order, want syscall.Errno) {
	t.Helper()
	if a := c.ask(t, o); a.Errno != want {
		t.Errorf("%s %s %s: %v, want %v", o.Do, o.Net, o.To, a.Errno, want)
	}
}

func runClient() {
	runtime.LockOSThread()
	in, out := json.NewDecoder(os.Stdin), json.NewEncoder(os.Stdout)
	for {
		var o order
		if err := in.Decode(&o); errors.Is(err, io.EOF) {
			return
		} else if err != nil {
			fmt.Fprintln(os.Stderr, "client:", err)
			os.Exit(1)
		}
		a, err := obey(o)
		if err != nil && !errors.As(err, &a.Errno) {
			fmt.Fprintf(os.Stderr, "client: %+v: %v\n", o, err)
			os.Exit(1)
		}
		out.Encode(a)
	}
}

// obey makes the system calls themselves: package net would make others of its own.
func obey(o order) (a answer, err error) {
	if o.Do == "close" {
		return a, unix.Close(o.Socket)
	}
	if a.Socket = o.Socket; a.Socket == 0 {
		if a.Socket, err = open(o); err != nil {
			return a, err
		}
	}
	switch o.Do {
	case "open":
		return a, nil
	case "bind":
		err = unix.Bind(a.Socket, o.sockaddr())
		unix.Close(a.Socket)
		return a, err
	case "connect":
		if err = unix.Connect(a.Socket, o.sockaddr()); err == nil && o.Net == "udp" {
			_, err = unix.Write(a.Socket, []byte("hello"))
		}
	case "send":
		err = unix.Sendto(a.Socket, []byte("hello"), 0, o.sockaddr())
	}
	if err == nil {
		err = a.listen(o)
	}
	if err != nil && o.Socket == 0 && o.Do == "connect" {
		unix.Close(a.Socket)
	}
	return a, err
}

func open(o order) (int, error) {
	family, kind := unix.AF_INET, unix.SOCK_STREAM
	if o.V6 || o.To.Addr().Is6() {
		family = unix.AF_INET6
	}
	if o.Net == "udp" {
		kind = unix.SOCK_DGRAM
	}
	fd, err := unix.Socket(family, kind|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, err
	}
	wait := o.Wait
	if wait == 0 {
		wait = 2 * time.Second
	}
	tv := unix.NsecToTimeval(wait.Nanoseconds())
	return fd, errors.Join(unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv), unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &tv))
}

func (o order) sockaddr() unix.Sockaddr {
	if o.V6 || o.To.Addr().Is6() {
		return &unix.SockaddrInet6{Port: int(o.To.Port()), Addr: o.To.Addr().As16()}
	}
	return &unix.SockaddrInet4{Port: int(o.To.Port()), Addr: o.To.Addr().As4()}
}

func (a *answer) listen(o order) error {
	buf := make([]byte, 256)
	n, from, err := unix.Recvfrom(a.Socket, buf, 0)
	if err != nil {
		return err
	}
	a.Said = string(buf[:n])
	a.Peer = addrPort(from)
	if o.Do == "connect" {
		peer, err := unix.Getpeername(a.Socket)
		if err != nil {
			return err
		}
		a.Peer = addrPort(peer)
	}
	local, err := unix.Getsockname(a.Socket)
	a.Local = addrPort(local)
	return err
}

func addrPort(s unix.Sockaddr) netip.AddrPort {
	switch s := s.(type) {
	case *unix.SockaddrInet4:
		return netip.AddrPortFrom(netip.AddrFrom4(s.Addr), uint16(s.Port))
	case *unix.SockaddrInet6:
		return netip.AddrPortFrom(netip.AddrFrom16(s.Addr).Unmap(), uint16(s.Port))
	}
	return netip.AddrPort{}
}
