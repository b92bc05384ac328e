// SPDX-License-Identifier: Apache-2.0

package netns

import (
	"encoding/binary"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/lash-net/lash/bpf"
	"github.com/lash-net/lash/internal/model"
	"github.com/lash-net/lash/internal/testutil"
)

// Not part of make test, for the time it takes to tell something: make shared-ports.
var sharedFor = flag.Duration("shared-ports", 0, "how long TestPortsAreShared runs; 0: it does not")

// The ports that masquerading, NodePorts' SNAT and the node's own sockets choose from in TestPortsAreShared: few, so that
// they meet all the time.
const (
	sharedFirst, sharedLast = 20000, 20127
	sharedLifetime          = 5 * time.Second // of datagrams' connections

	// A datagram is answered soon or not at all, and waited for much longer: when its socket is closed, no answer is under
	// way any more, which whoever has the port next would get, as without any translation.
	sharedAnswered = 300 * time.Millisecond
	sharedAwaited  = 1500 * time.Millisecond
)

// sharer is one kind of traffic.
type sharer struct {
	name    string
	ns      *os.File
	network string // udp or tcp, with the family
	to      []netip.AddrPort
	bind    bool // chooses its source port among the shared ones itself
	kernels bool // the node's kernel does

	ok, failed, wrong atomic.Int64
	examples          sync.Map
}

// saidBy tells who said every word, and when. A socket may get what is left of one before it with the same port, as
// without any translation; and an answer that comes when its connection has been forgotten may reach who has the port then.
var saidBy sync.Map

type speaker struct {
	ns   *os.File
	name string
	port int
}

type speech struct {
	by speaker
	at time.Time
}

func late(word uint64, to speaker) (string, bool) {
	s, ok := saidBy.Load(word)
	if !ok {
		return "nobody's", false
	}
	said := s.(speech)
	age := time.Since(said.at)
	return fmt.Sprintf("said by %s, port %d, %v before", said.by.name, said.by.port, age.Round(time.Millisecond)),
		age > sharedLifetime || said.by.ns == to.ns && said.by.port == to.port
}

// notOurs: an answer that somebody else's packet got, or a refusal where somebody listens.
type notOurs string

func (e notOurs) Error() string { return string(e) }

// Pods that are masqueraded, clients of a NodePort and processes of the node, all with source ports out of the same 128 on
// the same address of the node, towards the same destinations: every answer reaches who asked.
func TestPortsAreShared(t *testing.T) {
	if *sharedFor == 0 {
		t.Skip("a long run: make shared-ports")
	}
	c := newCluster(t, options{podsPerNode: 2, shared: true})
	n, far := c.nodes[0], c.nodes[1]
	testutil.In(t, n.ns, "sh", "-c", fmt.Sprintf("echo %d %d > /proc/sys/net/ipv4/ip_local_port_range", sharedFirst, sharedLast))
	for _, p := range []netip.Prefix{far.cidr4(), far.cidr6()} { // the sweep is to know that they are somebody's
		if err := n.dp.IPCache().Put(t.Context(), p, model.IPCacheEntry{Identity: model.World(p.Addr(), true), Node: far.ip4}); err != nil {
			t.Fatal(err)
		}
	}
	var sharers []*sharer
	for _, v6 := range []bool{false, true} {
		pick := func(v4Addr, v6Addr netip.Addr) netip.Addr {
			if v6 {
				return v6Addr
			}
			return v4Addr
		}
		family := map[bool]string{false: "4", true: "6"}[v6]
		backends := []netip.Addr{pick(far.pods[0].ip4, far.pods[0].ip6), pick(far.pods[1].ip4, far.pods[1].ip6)}
		c.balance(t, bpf.FrontendOutside, backends...)
		var world, pods []netip.AddrPort
		for port := range uint16(4) {
			world = append(world, netip.AddrPortFrom(pick(addr(outside4), addr(outside6)), servedPort+port))
		}
		for i, b := range backends {
			pods = append(pods, netip.AddrPortFrom(b, servedPort))
			echoAt(t, far.pods[i].ns, pods[i])
		}
		for _, at := range world {
			echoAt(t, c.outside, at)
		}
		services := []netip.AddrPort{netip.AddrPortFrom(pick(n.ip4, n.ip6), nodePort)}
		for _, proto := range []string{"udp", "tcp"} {
			sharers = append(sharers,
				&sharer{name: "pod a", ns: n.pods[0].ns, network: proto + family, to: world},
				&sharer{name: "pod b", ns: n.pods[1].ns, network: proto + family, to: world},
				&sharer{name: "node, port of the kernel's", ns: n.ns, network: proto + family, to: world, kernels: true},
				&sharer{name: "node, port of its own", ns: n.ns, network: proto + family, to: world, bind: true},
				&sharer{name: "node to NodePort's backend", ns: n.ns, network: proto + family, to: pods, bind: true},
				&sharer{name: "NodePort from outside", ns: c.outside, network: proto + family, to: services},
			)
		}
	}
	end := time.Now().Add(*sharedFor)
	var wg sync.WaitGroup
	for _, s := range sharers {
		wg.Add(1)
		go func() {
			defer wg.Done()
			runtime.LockOSThread() // never unlocked: the thread ends with the namespace it entered
			if err := unix.Setns(int(s.ns.Fd()), unix.CLONE_NEWNET); err != nil {
				t.Error(err)
				return
			}
			for time.Now().Before(end) {
				s.once()
			}
		}()
	}
	// The agent's sweep goes on meanwhile, twenty times as often as the agent does it.
	for time.Now().Before(end) {
		time.Sleep(min(500*time.Millisecond, time.Until(end)))
		n.do(t, "sweep", func() error { _, err := n.dp.Sweep(t.Context()); return err })
	}
	wg.Wait()

	var total, moved int64
	for _, s := range sharers {
		t.Logf("%-28s %s: %6d answered, %5d got no port or no answer", s.name, s.network, s.ok.Load(), s.failed.Load())
		total += s.ok.Load()
		s.examples.Range(func(what, _ any) bool {
			t.Errorf("%s %s: %v", s.name, s.network, what)
			return true
		})
		if s.wrong.Load() > 0 || s.ok.Load() == 0 {
			t.Errorf("%s %s: %d wrong of %d answers", s.name, s.network, s.wrong.Load(), s.ok.Load())
		}
		// The kernel itself runs out of ports: its closed TCP connections keep theirs for a minute.
		if !s.kernels && s.failed.Load() > 10+s.ok.Load()/4 {
			t.Errorf("%s %s: %d without answer, %d answered", s.name, s.network, s.failed.Load(), s.ok.Load())
		}
	}
	var perCPU []bpf.Count
	n.do(t, "counters", func() error {
		return n.dp.Map("lash_counts").Lookup(uint32(bpf.HookNetdevOut*bpf.CountRows+bpf.SlowMasquerade), &perCPU)
	})
	for _, c := range perCPU {
		moved += int64(c.Packets)
	}
	t.Logf("%d connections answered in %v; %d packets of the node's own gave way to another port", total, *sharedFor, moved)
	if moved == 0 {
		t.Error("no socket of the node ever met a claimed port: the test shows nothing")
	}
	if t.Failed() {
		n.dump(t)
	}
}

// once is one connection with words of its own.
func (s *sharer) once() {
	to := s.to[rand.IntN(len(s.to))]
	port := 0
	if s.bind {
		port = sharedFirst + rand.IntN(sharedLast-sharedFirst+1)
	}
	var err error
	if s.network[:3] == "udp" {
		err = s.datagrams(to, port)
	} else {
		err = s.stream(to, port)
	}
	var wrong notOurs
	switch {
	case err == nil:
		s.ok.Add(1)
	case errors.As(err, &wrong):
		if s.wrong.Add(1) <= 3 {
			s.examples.Store(err.Error(), true)
		}
	default:
		s.failed.Add(1)
		time.Sleep(10 * time.Millisecond)
	}
}

// datagrams sends a few and wants each back; nothing else may arrive, from anybody.
func (s *sharer) datagrams(to netip.AddrPort, port int) error {
	c, err := net.ListenUDP(s.network, &net.UDPAddr{Port: port})
	if err != nil {
		return err
	}
	defer c.Close()
	var sent []uint64
	got := 0
	buf := make([]byte, 256)
	me := speaker{s.ns, s.name, c.LocalAddr().(*net.UDPAddr).Port}
	for range 1 + rand.IntN(3) {
		word := rand.Uint64()
		sent = append(sent, word)
		saidBy.Store(word, speech{me, time.Now()})
		if _, err := c.WriteToUDPAddrPort(binary.BigEndian.AppendUint64(nil, word), to); err != nil {
			return err
		}
		c.SetReadDeadline(time.Now().Add(sharedAwaited))
		n, from, err := c.ReadFromUDPAddrPort(buf)
		if err != nil {
			continue
		}
		heard := binary.BigEndian.Uint64(buf)
		whose, old := late(heard, me)
		if n == 8 && old && !slices.Contains(sent, heard) {
			continue
		}
		if n != 8 || !slices.Contains(sent, heard) || from.Port() != to.Port() || from.Addr().Unmap() != to.Addr() {
			return notOurs(fmt.Sprintf("%v asked %v and got %x from %v, %s", c.LocalAddr(), to, buf[:n], from, whose))
		}
		got++
	}
	if got == 0 {
		return os.ErrDeadlineExceeded
	}
	return nil
}

// stream connects, says something and wants it back. Everybody listens, so that a refusal is somebody else's.
func (s *sharer) stream(to netip.AddrPort, port int) error {
	d := net.Dialer{Timeout: 1500 * time.Millisecond, LocalAddr: &net.TCPAddr{Port: port}, Control: func(_, _ string, c syscall.RawConn) error {
		return c.Control(func(fd uintptr) { unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEADDR, 1) })
	}}
	c, err := d.Dial(s.network, to.String())
	if errors.Is(err, syscall.ECONNREFUSED) || errors.Is(err, syscall.ECONNRESET) {
		return notOurs(fmt.Sprintf("connect from port %d to %v: %v", port, to, err))
	}
	if err != nil {
		return err
	}
	defer c.Close()
	if rand.IntN(2) == 0 {
		c.(*net.TCPConn).SetLinger(0)
	}
	c.SetDeadline(time.Now().Add(1500 * time.Millisecond))
	for range 1 + rand.IntN(3) {
		word := binary.BigEndian.AppendUint64(nil, rand.Uint64())
		if _, err := c.Write(word); err != nil {
			return resetOf(c, err)
		}
		back := make([]byte, len(word))
		if _, err := io.ReadFull(c, back); err != nil {
			return resetOf(c, err)
		}
		if string(back) != string(word) {
			return notOurs(fmt.Sprintf("%v said %x to %v and got %x", c.LocalAddr(), word, to, back))
		}
	}
	return nil
}

func resetOf(c net.Conn, err error) error {
	if errors.Is(err, syscall.ECONNRESET) || errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return notOurs(fmt.Sprintf("%v to %v: %v", c.LocalAddr(), c.RemoteAddr(), err))
	}
	return err
}

// echoAt sends back what it is sent, datagrams after a moment or, if the machine has kept it waiting, not at all.
func echoAt(t *testing.T, ns *os.File, at netip.AddrPort) {
	t.Helper()
	err := inNS(ns, func() error {
		l, err := net.Listen("tcp", at.String())
		if err != nil {
			return err
		}
		u, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(at))
		if err != nil {
			l.Close()
			return err
		}
		t.Cleanup(func() { l.Close(); u.Close() })
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				go func() {
					defer c.Close()
					c.SetDeadline(time.Now().Add(time.Minute))
					io.Copy(c, c)
				}()
			}
		}()
		go func() {
			buf := make([]byte, 256)
			for {
				n, from, err := u.ReadFromUDPAddrPort(buf)
				if err != nil {
					return
				}
				if n != 8 {
					continue
				}
				said := slices.Clone(buf[:n])
				time.AfterFunc(time.Duration(rand.IntN(20))*time.Millisecond, func() {
					if s, ok := saidBy.Load(binary.BigEndian.Uint64(said)); ok && time.Since(s.(speech).at) < sharedAnswered {
						u.WriteToUDPAddrPort(said, from)
					}
				})
			}
		}()
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}
