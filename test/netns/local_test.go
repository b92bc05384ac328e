// SPDX-License-Identifier: Apache-2.0

package netns

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"hash/fnv"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/lash-net/lash/internal/datapath"
)

// scenarioVariable makes the test binary play one scenario, with both ends of its connections in one process of the pod.
const scenarioVariable = "LASH_TEST_SCENARIO"

type scenario struct {
	Name    string
	Listen  netip.AddrPort
	Connect netip.AddrPort
}

var scenarios = map[string]func(scenario) error{
	"messages": messages, "load": load, "half-close": halfClose, "reset": reset, "nobody reads": nobodyReads, "nobody reads either": nobodyReadsEither, "hold": hold,
}

func runScenario() {
	var s scenario
	err := json.Unmarshal([]byte(os.Getenv(scenarioVariable)), &s)
	if err == nil {
		err = scenarios[s.Name](s)
	}
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
}

// play runs a scenario in the pod and the group.
func play(t *testing.T, ns, group *os.File, s scenario) {
	t.Helper()
	if out, err := command(t, ns, group, s, nil); err != nil {
		t.Errorf("%s: %v: %s", s.Name, err, out)
	}
}

func command(t *testing.T, ns, group *os.File, s scenario, started func(*exec.Cmd)) (string, error) {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	raw, err := json.Marshal(s)
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(self)
	cmd.Env = append(os.Environ(), scenarioVariable+"="+string(raw))
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(group.Fd()), Pdeathsig: syscall.SIGKILL}
	if started != nil {
		started(cmd)
	}
	err = inNS(ns, cmd.Run)
	return out.String(), err
}

// pair is a connection's two ends, within 30 seconds of work.
func (s scenario) pair() (client, server *net.TCPConn, err error) {
	l, err := net.Listen("tcp", s.Listen.String())
	if err != nil {
		return nil, nil, err
	}
	defer l.Close()
	c, err := net.DialTimeout("tcp", s.Connect.String(), 3*time.Second)
	if err != nil {
		return nil, nil, err
	}
	a, err := l.Accept()
	if err != nil {
		return nil, nil, err
	}
	client, server = c.(*net.TCPConn), a.(*net.TCPConn)
	deadline := time.Now().Add(30 * time.Second)
	return client, server, errors.Join(client.SetDeadline(deadline), server.SetDeadline(deadline))
}

// messages: requests and answers of random sizes, each checked.
func messages(s scenario) error {
	client, server, err := s.pair()
	if err != nil {
		return err
	}
	defer client.Close()
	defer server.Close()
	go io.Copy(struct{ io.Writer }{server}, struct{ io.Reader }{server}) // not by splice
	for range 200 {
		sent := noise(1 + rand.IntN(16<<10))
		if _, err := client.Write(sent); err != nil {
			return err
		}
		got := make([]byte, len(sent))
		if _, err := io.ReadFull(client, got); err != nil {
			return err
		}
		if !bytes.Equal(sent, got) {
			return fmt.Errorf("an answer of %d bytes is not what was sent", len(sent))
		}
	}
	return nil
}

func noise(n int) []byte {
	b := make([]byte, n+8)
	for i := 0; i < n; i += 8 {
		binary.NativeEndian.PutUint64(b[i:], rand.Uint64())
	}
	return b[:n]
}

// load: both directions at once, messages of random sizes from one byte to 256 KiB, readers that pause; what arrives is
// what was sent, and ends where it ended.
func load(s scenario) error {
	client, server, err := s.pair()
	if err != nil {
		return err
	}
	defer client.Close()
	defer server.Close()
	var wg sync.WaitGroup
	var sent, got [2]uint64
	errs := make([]error, 4)
	for i, end := range []*net.TCPConn{client, server} {
		wg.Go(func() {
			sum := fnv.New64a()
			for total := 0; total < 8<<20; {
				b := noise(1 + rand.IntN(1<<rand.IntN(19)))
				total += len(b)
				sum.Write(b)
				if _, errs[i] = end.Write(b); errs[i] != nil {
					return
				}
			}
			errs[i] = end.CloseWrite()
			sent[i] = sum.Sum64()
		})
		wg.Go(func() {
			sum := fnv.New64a()
			b := make([]byte, 64<<10)
			for {
				n, err := end.Read(b[:1+rand.IntN(len(b))])
				sum.Write(b[:n])
				if err == io.EOF {
					break
				}
				if errs[2+i] = err; err != nil {
					return
				}
				if rand.IntN(50) == 0 {
					time.Sleep(time.Millisecond)
				}
			}
			got[1-i] = sum.Sum64()
		})
	}
	wg.Wait()
	if err := errors.Join(errs...); err != nil {
		return err
	}
	if sent != got {
		return fmt.Errorf("what arrived is not what was sent: %x, %x", got, sent)
	}
	return nil
}

// halfClose: one end has said all, the other goes on.
func halfClose(s scenario) error {
	client, server, err := s.pair()
	if err != nil {
		return err
	}
	defer client.Close()
	defer server.Close()
	client.Write([]byte("question"))
	if err := client.CloseWrite(); err != nil {
		return err
	}
	if all, err := io.ReadAll(server); err != nil || string(all) != "question" {
		return fmt.Errorf("the server read %q, %v", all, err)
	}
	for range 3 {
		server.Write([]byte("answer "))
	}
	server.Close()
	if all, err := io.ReadAll(client); err != nil || string(all) != "answer answer answer " {
		return fmt.Errorf("the client read %q, %v", all, err)
	}
	return nil
}

// reset: an end that is aborted is one that is reset for the other, whatever was exchanged before.
func reset(s scenario) error {
	client, server, err := s.pair()
	if err != nil {
		return err
	}
	defer client.Close()
	buf := make([]byte, 8)
	client.Write([]byte("hello"))
	if _, err := server.Read(buf); err != nil {
		return err
	}
	server.Write([]byte("hello"))
	if _, err := client.Read(buf); err != nil {
		return err
	}
	server.SetLinger(0)
	server.Close()
	if _, err := client.Read(buf); !errors.Is(err, syscall.ECONNRESET) {
		return fmt.Errorf("the client read %v, want a reset", err)
	}
	if _, err := client.Write(buf); !errors.Is(err, syscall.EPIPE) && !errors.Is(err, syscall.ECONNRESET) {
		return fmt.Errorf("the client wrote %v, want a broken pipe", err)
	}
	return nil
}

// nobodyReads: a writer of small messages is held up like by any connection.
func nobodyReads(s scenario) error {
	client, server, err := s.pair()
	if err != nil {
		return err
	}
	defer client.Close()
	defer server.Close()
	client.SetDeadline(time.Now().Add(2 * time.Second))
	const limit = 64 << 20
	total := 0
	for total < limit {
		n, err := client.Write(noise(1000))
		total += n
		if err != nil {
			break
		}
	}
	if total >= limit {
		return fmt.Errorf("%d bytes were taken though nobody reads", total)
	}
	server.SetDeadline(time.Now().Add(10 * time.Second))
	client.CloseWrite()
	n, err := io.Copy(struct{ io.Writer }{io.Discard}, struct{ io.Reader }{server})
	if err != nil || int(n) != total {
		return fmt.Errorf("%d of %d bytes arrived, %v", n, total, err)
	}
	return nil
}

// nobodyReadsEither: the same where each end's message may be taken for an answer to the other's.
func nobodyReadsEither(s scenario) error {
	client, server, err := s.pair()
	if err != nil {
		return err
	}
	defer client.Close()
	defer server.Close()
	const limit = 64 << 20
	ends, total := []*net.TCPConn{client, server}, [2]int{}
	for i, full := 0, 0; full < 2; i = 1 - i {
		ends[i].SetWriteDeadline(time.Now().Add(500 * time.Millisecond))
		n, err := ends[i].Write(noise(1000))
		if total[i] += n; total[i] >= limit {
			return fmt.Errorf("%v bytes were taken though nobody reads", total)
		}
		full++
		if err == nil {
			full = 0
		}
	}
	for i, end := range ends {
		end.CloseWrite()
		n, err := io.Copy(io.Discard, struct{ io.Reader }{ends[1-i]})
		if err != nil || int(n) != total[i] {
			return fmt.Errorf("%d of %d bytes arrived, %v", n, total[i], err)
		}
	}
	return nil
}

// hold exchanges messages until its standard input ends.
func hold(s scenario) error {
	client, server, err := s.pair()
	if err != nil {
		return err
	}
	defer client.Close()
	defer server.Close()
	client.SetDeadline(time.Now().Add(time.Minute))
	server.SetDeadline(time.Now().Add(time.Minute))
	go io.Copy(struct{ io.Writer }{server}, struct{ io.Reader }{server})
	var stop atomic.Bool
	go func() {
		io.Copy(io.Discard, os.Stdin)
		stop.Store(true)
	}()
	n := 0
	for buf := make([]byte, 8); !stop.Load(); n++ {
		if _, err := client.Write(buf); err != nil {
			return err
		}
		if _, err := io.ReadFull(client, buf); err != nil {
			return err
		}
	}
	fmt.Println(n)
	return nil
}

// loCapture counts TCP packets on a namespace's loopback device, with payload and without.
func loCapture(t *testing.T, ns *os.File) func() (payload, bare int) {
	t.Helper()
	var fd int
	err := inNS(ns, func() (err error) {
		fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_NONBLOCK, 0)
		if err != nil {
			return err
		}
		lo, err := net.InterfaceByName("lo")
		if err != nil {
			return err
		}
		all := uint16(unix.ETH_P_ALL<<8 | unix.ETH_P_ALL>>8)
		return errors.Join(unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 64<<20), unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: all, Ifindex: lo.Index}))
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	return func() (payload, bare int) {
		buf := make([]byte, 256)
		for {
			n, from, err := unix.Recvfrom(fd, buf, unix.MSG_TRUNC)
			if err != nil {
				return payload, bare
			}
			if from.(*unix.SockaddrLinklayer).Pkttype == unix.PACKET_OUTGOING {
				continue // the same packet once more
			}
			l4 := 40
			if buf[0]>>4 == 4 {
				l4 = int(buf[0]&15) * 4
			}
			if n > l4+int(buf[l4+12]>>4)*4 {
				payload++
			} else {
				bare++
			}
		}
	}
}

// aPod is one namespace of a node whose connections within it are by socket, and the group of its processes.
func aPod(t *testing.T) (*node, *pod, *os.File) {
	t.Helper()
	c := newCluster(t, options{podsPerNode: 1})
	n := c.nodes[0]
	p := n.pods[0]
	mount := t.TempDir()
	var group *os.File
	n.do(t, "cgroup", func() error {
		if err := unix.Mount("none", mount, "cgroup2", 0, ""); err != nil {
			return err
		}
		path := filepath.Join(mount, fmt.Sprintf("lash-local-%d-%d", os.Getpid(), p.ns.Fd()))
		if err := os.Mkdir(path, 0o755); err != nil {
			return err
		}
		var err error
		if group, err = os.Open(path); err != nil {
			return err
		}
		t.Cleanup(func() {
			group.Close()
			n.do(t, "remove cgroup", func() error { return errors.Join(n.dp.DetachLocal(), os.Remove(path)) })
		})
		return n.dp.AttachLocal(path)
	})
	if err := n.dp.SetLocalNetns(map[uint64]bool{cookieOf(t, p.ns): true}); err != nil {
		t.Fatal(err)
	}
	return n, p, group
}

func cookieOf(t *testing.T, ns *os.File) (cookie uint64) {
	t.Helper()
	if err := inNS(ns, func() (err error) {
		cookie, err = datapath.NetnsCookie()
		return err
	}); err != nil {
		t.Fatal(err)
	}
	return cookie
}

func localCounts(t *testing.T, n *node) datapath.LocalCounts {
	t.Helper()
	c, err := n.dp.LocalCounts()
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func TestMessagesWithinAPodTakeNoPackets(t *testing.T) {
	n, p, group := aPod(t)
	for name, s := range localAddrs(p) {
		for kind, want := range map[string]struct {
			messages uint64 // by socket, at least
			bulk     uint64 // directions that go on by packets, at most
		}{
			"messages": {400, 0}, "half-close": {4, 0}, "reset": {2, 0}, "load": {2, 2}, "nobody reads": {60, 1}, "nobody reads either": {120, 2},
		} {
			t.Run(name+", "+kind, func(t *testing.T) {
				s.Name = kind
				look := loCapture(t, p.ns)
				before := localCounts(t, n)
				play(t, p.ns, group, s)
				after := localCounts(t, n)
				payload, bare := look()
				messages, bulk := after.Messages-before.Messages, after.Bulk-before.Bulk
				if messages < want.messages || bulk != want.bulk || (payload == 0) != (bulk == 0) || bare < 3 {
					t.Errorf("%d packets with payload, %d without; %d messages by socket, %d directions too much for that", payload, bare, messages, bulk)
				}
				if bytes := after.Bytes - before.Bytes; want.bulk > 0 && kind != "load" && bytes > want.bulk*64<<10 {
					t.Errorf("%d bytes by socket though nobody read", bytes)
				}
			})
		}
	}
	for deadline := time.Now().Add(3 * time.Second); n.rows(t, "lash_local_socks") != 0; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%d sockets are left of connections that are closed", n.rows(t, "lash_local_socks"))
		}
	}
}

// byPackets wants a scenario to work, and all of it by packets.
func byPackets(t *testing.T, n *node, p *pod, group *os.File, s scenario) {
	t.Helper()
	look := loCapture(t, p.ns)
	before := localCounts(t, n)
	play(t, p.ns, group, s)
	if after := localCounts(t, n); after != before {
		t.Errorf("%+v: by socket %+v, before %+v", s, after, before)
	}
	if payload, _ := look(); payload == 0 {
		t.Errorf("%+v: no packets with payload", s)
	}
}

// Netfilter sends a connection elsewhere than its client believes, as service meshes do: by another port of the same address,
// where both tuples look local, and from an address of nobody's.
func TestRedirectedConnectionsStayWithPackets(t *testing.T) {
	n, p, group := aPod(t)
	for _, tables := range []string{"iptables", "ip6tables"} {
		if out, err := try(p.ns, tables, "-t", "nat", "-A", "OUTPUT", "-p", "tcp", "--dport", "7200", "-j", "REDIRECT", "--to-ports", "7100"); err != nil {
			t.Skipf("this machine has no %s: %s", tables, out)
		}
	}
	for name, s := range localAddrs(p) {
		s.Connect = netip.AddrPortFrom(s.Connect.Addr(), 7200)
		any := netip.IPv4Unspecified() // netfilter redirects to loopback
		if s.Connect.Addr().Is6() {
			any = netip.IPv6Unspecified()
		}
		s.Listen = netip.AddrPortFrom(any, 7100)
		for _, s.Name = range []string{"messages", "load"} {
			t.Run(name+", "+s.Name, func(t *testing.T) { byPackets(t, n, p, group, s) })
		}
	}
	for name, a := range map[string][2]netip.Addr{"IPv4 elsewhere": {netip.IPv4Unspecified(), addr("198.51.100.7")}, "IPv6 elsewhere": {netip.IPv6Unspecified(), addr("2001:db8::7")}} {
		s := scenario{Name: "messages", Listen: netip.AddrPortFrom(a[0], 7100), Connect: netip.AddrPortFrom(a[1], 7200)}
		t.Run(name, func(t *testing.T) { byPackets(t, n, p, group, s) })
	}
}

func TestOnlyPodsThatAskHaveMessagesWithoutPackets(t *testing.T) {
	n, p, group := aPod(t)
	s := localAddrs(p)["IPv4"]
	s.Name = "messages"
	own, other := cookieOf(t, p.ns), cookieOf(t, n.ns)
	for _, asked := range []map[uint64]bool{{other: true}, {}, {own: true, other: true}} {
		if err := n.dp.SetLocalNetns(asked); err != nil {
			t.Fatal(err)
		}
		before := localCounts(t, n)
		if !asked[own] {
			byPackets(t, n, p, group, s)
		} else if play(t, p.ns, group, s); localCounts(t, n) == before {
			t.Errorf("asked %v: nothing by socket", asked)
		}
	}
	n.do(t, "detach", n.dp.DetachLocal)
	for deadline := time.Now().Add(3 * time.Second); ; { // the kernel detaches when the last reader of the link is done
		before := localCounts(t, n)
		play(t, p.ns, group, s)
		if localCounts(t, n) == before {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("messages still go by socket after the programs were detached")
		}
	}
}

// Connections go on while the agent is gone and while another one attaches its programs anew, and new ones begin.
func TestMessagesWithinAPodWithoutTheAgent(t *testing.T) {
	n, p, group := aPod(t)
	s := localAddrs(p)["127.0.0.1"]
	s.Name = "hold"
	stdin, stop, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer stdin.Close()
	done := make(chan error)
	go func() {
		out, err := command(t, p.ns, group, s, func(c *exec.Cmd) { c.Stdin = stdin })
		if err != nil {
			err = fmt.Errorf("%w: %s", err, out)
		}
		done <- err
	}()
	grows := func(what string) {
		t.Helper()
		before := localCounts(t, n)
		for deadline := time.Now().Add(3 * time.Second); localCounts(t, n).Messages < before.Messages+100; time.Sleep(10 * time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatalf("%s: %+v, then %+v", what, before, localCounts(t, n))
			}
		}
	}
	grows("with the agent")
	again := localAddrs(p)["IPv4"]
	again.Name, again.Listen, again.Connect = "messages", netip.AddrPortFrom(p.ip4, 7101), netip.AddrPortFrom(p.ip4, 7101)
	n.do(t, "the agent ends", n.dp.Close)
	before := time.Now()
	play(t, p.ns, group, again)
	n.do(t, "another begins", func() error {
		if err := n.open(n.cluster, options{}); err != nil {
			return err
		}
		return n.dp.AttachLocal(fmt.Sprintf("/proc/self/fd/%d", group.Fd()))
	})
	t.Logf("the agent was away for %s", time.Since(before).Round(time.Millisecond))
	grows("with another agent")
	was := localCounts(t, n)
	play(t, p.ns, group, again)
	if is := localCounts(t, n); is.Messages < was.Messages+400 {
		t.Errorf("a new connection: %+v, then %+v", was, is)
	}
	stop.Close()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

func localAddrs(p *pod) map[string]scenario {
	out := map[string]scenario{}
	for name, a := range map[string]netip.Addr{"127.0.0.1": addr("127.0.0.1"), "::1": netip.IPv6Loopback(), "IPv4": p.ip4, "IPv6": p.ip6} {
		out[name] = scenario{Listen: netip.AddrPortFrom(a, 7100), Connect: netip.AddrPortFrom(a, 7100)}
	}
	return out
}
