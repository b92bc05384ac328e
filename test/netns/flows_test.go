// SPDX-License-Identifier: Apache-2.0

package netns

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/lash-net/lash/internal/datapath"
	"github.com/lash-net/lash/internal/testutil"
)

const (
	flowsEach  = 30000 // of each of two pods, to one destination, at a time
	flowsMore  = 3000  // than there are ports for
	flowsFirst = 1024  // their first source port
	flowsBatch = 250   // asked at once: no queue overflows

	flowsThreads = 4 // of each protocol, and of TCP's other ends
	flowsFiles   = 2*flowsEach/flowsThreads + 2000

	floodPorts = 65535
	floodFrom  = 3 // sockets of the flooding pod, each to all of these ports
)

// filesThread runs functions in a network namespace with a table of open files of its own, which it may fill like a process,
// by itself. What it leaves open is closed with it.
type filesThread struct{ calls chan func() }

func newFilesThread(t *testing.T, ns *os.File) *filesThread {
	t.Helper()
	th := &filesThread{calls: make(chan func())}
	running, started := make(chan struct{}), make(chan error)
	body := func() {
		runtime.LockOSThread() // never unlocked: the thread ends with its files
		close(running)
		started <- errors.Join(unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET), unix.Unshare(unix.CLONE_FILES))
		for f := range th.calls {
			f()
		}
	}
	go func() {
		runtime.LockOSThread()
		if unix.Gettid() != unix.Getpid() {
			body()
			return
		}
		// The main thread's table is the one that others find below /proc: the body gets another thread, as this one is taken.
		go body()
		<-running
		runtime.UnlockOSThread()
	}()
	if err := <-started; err != nil {
		t.Fatalf("a thread with files of its own: %v", err)
	}
	t.Cleanup(func() { close(th.calls) })
	return th
}

func (th *filesThread) do(f func() error) error {
	done := make(chan error)
	th.calls <- func() { done <- f() }
	return <-done
}

// flows are connected sockets of one pod. Each says its name, a number that no other has, and is to hear it again.
type flows struct {
	*filesThread
	fds  []int
	kind int
	name uint64 // of the first
}

func sockaddr(a netip.AddrPort) unix.Sockaddr {
	if a.Addr().Is4() {
		return &unix.SockaddrInet4{Addr: a.Addr().As4(), Port: int(a.Port())}
	}
	return &unix.SockaddrInet6{Addr: a.Addr().As16(), Port: int(a.Port())}
}

// again repeats a call that a signal has interrupted: the runtime sends its threads some.
func again(f func() error) error {
	for {
		if err := f(); err != unix.EINTR {
			return err
		}
	}
}

func newFlows(t *testing.T, ns *os.File, name uint64) *flows {
	t.Helper()
	return &flows{filesThread: newFilesThread(t, ns), name: name}
}

// dial opens n flows from successive source ports. Kind: unix.SOCK_DGRAM or SOCK_STREAM, and perhaps SOCK_NONBLOCK: then it
// does not wait for connections.
func (f *flows) dial(kind int, to netip.AddrPort, first, n int) error {
	family, any := unix.AF_INET, netip.IPv4Unspecified()
	if to.Addr().Is6() {
		family, any = unix.AF_INET6, netip.IPv6Unspecified()
	}
	peer := sockaddr(to)
	f.kind = kind
	for i := range n {
		fd, err := unix.Socket(family, kind|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return os.NewSyscallError("socket", err)
		}
		f.fds = append(f.fds, fd)
		// What does not answer for so long has lost a packet, or its connection.
		if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 5}); err != nil {
			return err
		}
		if err := unix.Bind(fd, sockaddr(netip.AddrPortFrom(any, uint16(first+i)))); err != nil {
			return fmt.Errorf("port %d: %w", first+i, err)
		}
		switch err := unix.Connect(fd, peer); err {
		case nil, unix.EINPROGRESS:
		case unix.EINTR: // the kernel goes on; what is said next waits for it
		default:
			return fmt.Errorf("connect from port %d: %w", first+i, err)
		}
	}
	return nil
}

func (f *flows) close() {
	for _, fd := range f.fds {
		unix.Close(fd)
	}
}

// say has one flow say its name.
func (f *flows) say(i int) error {
	word := binary.BigEndian.AppendUint64(nil, f.name+uint64(i))
	return again(func() error { return unix.Send(f.fds[i], word, 0) })
}

// hear is what one flow hears next: nil is its own name.
func (f *flows) hear(i int) error {
	var heard [16]byte
	var n int
	err := again(func() (err error) { n, _, err = unix.Recvfrom(f.fds[i], heard[:], 0); return err })
	switch {
	case err != nil:
		return err
	case n != 8 || binary.BigEndian.Uint64(heard[:]) != f.name+uint64(i):
		return fmt.Errorf("heard %x", heard[:n])
	}
	return nil
}

// ask has each flow say its name and hear it, and nothing else.
func (f *flows) ask() error {
	for first := 0; first < len(f.fds); first += flowsBatch {
		batch := f.fds[first:min(first+flowsBatch, len(f.fds))]
		for i := range batch {
			if err := f.say(first + i); err != nil {
				return fmt.Errorf("flow %d speaks: %w", first+i, err)
			}
		}
		for i := range batch {
			err := f.hear(first + i)
			// A machine that is busy enough loses datagrams.
			for again := 0; again < 3 && err == unix.EAGAIN && f.kind == unix.SOCK_DGRAM; again++ {
				if err = f.say(first + i); err == nil {
					err = f.hear(first + i)
				}
			}
			if err != nil {
				return fmt.Errorf("flow %d: %w", first+i, err)
			}
		}
	}
	return f.silent()
}

// silent: no flow has heard what it has not said.
func (f *flows) silent() error {
	var heard [16]byte
	for i, fd := range f.fds {
		for {
			n, _, err := unix.Recvfrom(fd, heard[:], unix.MSG_DONTWAIT)
			if err == unix.EAGAIN {
				break
			}
			if err != nil || n != 8 || binary.BigEndian.Uint64(heard[:]) != f.name+uint64(i) {
				return fmt.Errorf("flow %d hears %x besides, %v", i, heard[:max(n, 0)], err)
			}
		}
	}
	return nil
}

// listener is the destination: it says everything again, and remembers from where it came.
type listener struct {
	mu   sync.Mutex
	from map[uint64]netip.AddrPort // by name
	bad  []string
}

func (l *listener) heard(word []byte, from netip.AddrPort) {
	from = netip.AddrPortFrom(from.Addr().Unmap(), from.Port())
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(word) != 8 {
		l.bad = append(l.bad, fmt.Sprintf("%x from %v", word, from))
		return
	}
	name := binary.BigEndian.Uint64(word)
	if before, known := l.from[name]; known && before != from {
		l.bad = append(l.bad, fmt.Sprintf("flow %x came from %v and now from %v", name, before, from))
	}
	l.from[name] = from
}

// check: every flow came from its own port of the node, and from one only.
func (l *listener) check(t *testing.T, node netip.Addr, flows int) {
	t.Helper()
	l.mu.Lock()
	defer l.mu.Unlock()
	ports := map[netip.AddrPort]uint64{}
	for name, from := range l.from {
		if other, taken := ports[from]; taken || from.Addr() != node {
			l.bad = append(l.bad, fmt.Sprintf("flows %x and %x came from %v", name, other, from))
		}
		ports[from] = name
	}
	if len(l.bad) > 0 || len(ports) != flows {
		t.Errorf("%d flows from %d ports, %d of them wrong: %v", len(l.from), len(ports), len(l.bad), l.bad[:min(len(l.bad), 5)])
	}
}

// listenTCP has a namespace answer at an address: as many threads as it takes to hold the connections.
func listenTCP(t *testing.T, ns *os.File, at netip.AddrPort) *listener {
	t.Helper()
	l := &listener{from: map[uint64]netip.AddrPort{}}
	var wg sync.WaitGroup
	var ended atomic.Bool
	t.Cleanup(func() { ended.Store(true); wg.Wait() })
	for range flowsThreads {
		th := newFilesThread(t, ns)
		var ready int
		if err := th.do(func() (err error) { ready, err = acceptor(at); return err }); err != nil {
			t.Fatal(err)
		}
		wg.Go(func() {
			if err := th.do(func() error { return l.accept(ready, &ended) }); err != nil {
				t.Errorf("TCP at %v: %v", at, err)
			}
		})
	}
	return l
}

// acceptor is an epoll of one of several sockets that listen at an address. Its event has no file of its own.
func acceptor(at netip.AddrPort) (ready int, err error) {
	family := unix.AF_INET
	if at.Addr().Is6() {
		family = unix.AF_INET6
	}
	fd, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, err
	}
	if err := errors.Join(unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEPORT, 1), unix.Bind(fd, sockaddr(at)), unix.Listen(fd, 4096)); err != nil {
		return 0, err
	}
	if ready, err = unix.EpollCreate1(unix.EPOLL_CLOEXEC); err != nil {
		return 0, err
	}
	return ready, unix.EpollCtl(ready, unix.EPOLL_CTL_ADD, fd, &unix.EpollEvent{Events: unix.EPOLLIN, Fd: int32(fd), Pad: acceptorMark})
}

const acceptorMark = 1

// accept serves connections until the end.
func (l *listener) accept(ready int, ended *atomic.Bool) error {
	events := make([]unix.EpollEvent, 256)
	word := make([]byte, 16)
	peers := map[int32]netip.AddrPort{}
	for !ended.Load() {
		n, err := unix.EpollWait(ready, events, 100)
		if err != nil && err != unix.EINTR {
			return err
		}
		for _, e := range events[:max(n, 0)] {
			if e.Pad == acceptorMark {
				fd, peer, err := unix.Accept4(int(e.Fd), unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC)
				if err == unix.EAGAIN || err == unix.EINTR {
					continue
				}
				if err != nil {
					return fmt.Errorf("accept: %w", err)
				}
				switch a := peer.(type) {
				case *unix.SockaddrInet4:
					peers[int32(fd)] = netip.AddrPortFrom(netip.AddrFrom4(a.Addr), uint16(a.Port))
				case *unix.SockaddrInet6:
					peers[int32(fd)] = netip.AddrPortFrom(netip.AddrFrom16(a.Addr), uint16(a.Port))
				}
				if err := unix.EpollCtl(ready, unix.EPOLL_CTL_ADD, fd, &unix.EpollEvent{Events: unix.EPOLLIN, Fd: int32(fd)}); err != nil {
					return err
				}
				continue
			}
			n, err := unix.Read(int(e.Fd), word)
			switch {
			case err == unix.EAGAIN || err == unix.EINTR:
			case n <= 0:
				unix.Close(int(e.Fd))
			default:
				l.heard(word[:n], peers[e.Fd])
				unix.Write(int(e.Fd), word[:n])
			}
		}
	}
	return nil
}

// listenUDP does it with datagrams.
func listenUDP(t *testing.T, ns *os.File, at netip.AddrPort) *listener {
	t.Helper()
	l := &listener{from: map[uint64]netip.AddrPort{}}
	err := inNS(ns, func() error {
		u, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(at))
		if err != nil {
			return err
		}
		t.Cleanup(func() { u.Close() })
		raw, err := u.SyscallConn()
		if err != nil {
			return err
		}
		var forced error // past rmem_max: room for a batch of every thread
		if err := raw.Control(func(fd uintptr) { forced = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 8<<20) }); err != nil || forced != nil {
			return errors.Join(err, forced)
		}
		go func() {
			word := make([]byte, 16)
			for {
				n, from, err := u.ReadFromUDPAddrPort(word)
				if errors.Is(err, net.ErrClosed) {
					return
				}
				l.heard(word[:n], from)
				u.WriteToUDPAddrPort(word[:n], from)
			}
		}()
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// together does the same with all flows at once.
func together(t *testing.T, what string, all []*flows, f func(i int, one *flows) error) {
	t.Helper()
	errs := make([]error, len(all))
	var wg sync.WaitGroup
	for i, one := range all {
		wg.Go(func() { errs[i] = one.do(func() error { return f(i, one) }) })
	}
	wg.Wait()
	if err := errors.Join(errs...); err != nil {
		t.Fatalf("%s: %v", what, err)
	}
}

// Sixty thousand flows of two pods to one address and port outside, as sockets, all open at a time, by UDP and again by TCP:
// each has a port of the node's of its own, and hears its own answers and nothing else. When the ports are used up, the node
// says towards where and who has them; and a third pod's flood, which fills the tables, takes nothing from any of them.
func TestSixtyThousandFlowsToOneDestination(t *testing.T) {
	testutil.NeedRoot(t)
	var files unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &files); err != nil || files.Cur < flowsFiles {
		t.Fatalf("it takes %d open files, and there may be %d (%v): raise the hard limit, ulimit -Hn", flowsFiles, files.Cur, err)
	}
	for _, v6 := range []bool{false, true} {
		t.Run(map[bool]string{false: "IPv4", true: "IPv6"}[v6], func(t *testing.T) {
			c := newCluster(t, options{podsPerNode: 3, connMax: 1 << 18, allPorts: true})
			n, world := c.nodes[0], netip.AddrPortFrom(addr(outside4), servedPort)
			if v6 {
				world = netip.AddrPortFrom(addr(outside6), servedPort)
			}
			live := c.sixtyThousand(t, unix.SOCK_DGRAM, world, listenUDP(t, c.outside, world))
			c.exhaust(t, "UDP", unix.SOCK_DGRAM, world)
			live = append(live, c.sixtyThousand(t, unix.SOCK_STREAM, world, listenTCP(t, c.outside, world))...)
			c.exhaust(t, "TCP", unix.SOCK_STREAM, world)

			start := time.Now()
			n.flood(t, n.pods[2].ns, world.Addr())
			t.Logf("the flood took %v", time.Since(start).Round(time.Millisecond))
			start = time.Now()
			together(t, "after the flood", live, func(_ int, f *flows) error { return f.ask() })
			t.Logf("%d flows answered again in %v", 4*flowsEach, time.Since(start).Round(time.Millisecond))
			together(t, "in the end", live, func(_ int, f *flows) error { return f.silent() })
		})
	}
}

// sixtyThousand opens the flows of one protocol and has each answered.
func (c *cluster) sixtyThousand(t *testing.T, kind int, to netip.AddrPort, l *listener) (live []*flows) {
	t.Helper()
	const share = 2 * flowsEach / flowsThreads
	start := time.Now()
	for i := range flowsThreads {
		live = append(live, newFlows(t, c.nodes[0].pods[i%2].ns, uint64(i)<<32))
	}
	together(t, "the first time", live, func(i int, f *flows) error {
		if err := f.dial(kind, to, flowsFirst+i/2*share, share); err != nil {
			return err
		}
		return f.ask()
	})
	node := c.nodes[0].ip4
	if to.Addr().Is6() {
		node = c.nodes[0].ip6
	}
	l.check(t, node, 2*flowsEach)
	t.Logf("%d flows opened and answered in %v", 2*flowsEach, time.Since(start).Round(time.Millisecond))
	return live
}

// exhaust has the second pod open more flows than there are ports: who gets one is answered, and the node says who has them.
func (c *cluster) exhaust(t *testing.T, proto string, kind int, to netip.AddrPort) {
	t.Helper()
	n := c.nodes[0]
	more, got := newFlows(t, n.pods[1].ns, flowsThreads<<32), 0
	together(t, proto, []*flows{more}, func(int, *flows) error {
		defer more.close()
		if err := more.dial(kind|unix.SOCK_NONBLOCK, to, flowsFirst+flowsEach, flowsMore); err != nil {
			return err
		}
		time.Sleep(300 * time.Millisecond) // for the connections
		for i := range more.fds {
			if err := more.say(i); err != nil && err != unix.EAGAIN {
				return fmt.Errorf("flow %d speaks: %w", i, err)
			}
		}
		time.Sleep(300 * time.Millisecond)
		for i := range more.fds {
			switch err := more.hear(i); err {
			case nil:
				got++
			case unix.EAGAIN:
			default:
				return fmt.Errorf("flow %d: %w", i, err)
			}
		}
		return nil
	})
	var uses []datapath.PortUse
	var dropped uint64
	n.do(t, "who has the ports", func() error {
		full, err := n.dp.ExhaustedPorts(60)
		if err == nil {
			uses, err = n.dp.PortUses(full)
		}
		dropped = n.drops(t, "No mapping for NAT masquerade")
		return err
	})
	uses = slices.DeleteFunc(uses, func(u datapath.PortUse) bool { return datapath.ProtoName(u.Proto) != proto })
	if got == flowsMore || len(uses) != 1 || dropped == 0 {
		t.Fatalf("%s: %d of %d more flows were answered, %d packets dropped; told of %+v", proto, got, flowsMore, dropped, uses)
	}
	u, a, b := uses[0], n.pods[0].ip4, n.pods[1].ip4
	if to.Addr().Is6() {
		a, b = n.pods[0].ip6, n.pods[1].ip6
	}
	t.Logf("%s: of %d more flows %d got a port; %d of %d ports in use, %d packets dropped", proto, flowsMore, got, u.Ports, n.dp.SNATPorts(), u.Dropped)
	if u.To != to || u.Dropped == 0 || u.Ports < 2*flowsEach+got || len(u.Users) != 2 || u.Users[0].Addr != b || u.Users[1] != (datapath.PortUser{Addr: a, Ports: flowsEach}) {
		t.Errorf("%s: told of %+v", proto, u)
	}
}

// drops is how many packets were dropped for a reason.
func (nd *node) drops(t *testing.T, reason string) (n uint64) {
	t.Helper()
	_, rows, err := nd.dp.Dump("metrics")
	if err != nil {
		t.Error(err)
	}
	for _, r := range rows {
		if r[0] == reason {
			packets, err := strconv.ParseUint(r[2], 10, 64)
			if err != nil {
				t.Errorf("metrics row %q: %v", r, err)
			}
			n += packets
		}
	}
	return n
}

// flood sends datagrams of new flows until the node has no room for any more.
func (nd *node) flood(t *testing.T, from *os.File, to netip.Addr) {
	t.Helper()
	network := "udp4"
	if to.Is6() {
		network = "udp6"
	}
	err := inNS(from, func() error {
		for range floodFrom {
			u, err := net.ListenUDP(network, nil)
			if err != nil {
				return err
			}
			defer u.Close()
			for port := range floodPorts {
				if port+1 == servedPort {
					continue // it is full already
				}
				if _, err := u.WriteToUDPAddrPort([]byte("flood"), netip.AddrPortFrom(to, uint16(port+1))); err != nil {
					return err
				}
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	nd.do(t, "drops", func() error {
		if nd.drops(t, "CT: Map insertion failed") == 0 {
			t.Error("the flood has not filled the tables: it shows nothing")
		}
		return nil
	})
}
