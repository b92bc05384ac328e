// SPDX-License-Identifier: Apache-2.0

package netns

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
	"golang.org/x/sys/unix"

	"github.com/lash-net/lash/bpf"
	"github.com/lash-net/lash/internal/datapath"
	"github.com/lash-net/lash/internal/monitor"
	"github.com/lash-net/lash/internal/testutil"
)

// marker begins the payload of packets that are watched; eight bytes follow that tell them apart.
const marker = "lash-seen"

// watcher sees where marked packets come along: in pods, at nodes' own processes, on nodes' wires, among drops.
type watcher struct {
	c    *cluster
	mu   sync.Mutex
	seen map[uint64][]sighting
	next uint64
	mac  map[*os.File][]byte // of eth0
}

type sighting struct {
	kind string // delivered, host, wire, answer, dropped
	what string
}

func watch(t *testing.T, c *cluster) *watcher {
	t.Helper()
	w := &watcher{c: c, seen: map[uint64][]sighting{}, mac: map[*os.File][]byte{}}
	// Of two nodes one knows what to do about everybody.
	n2 := c.nodes[1]
	ip(t, n2.ns, "route add default via "+outside4+" dev eth0", "route add default via "+outside6+" dev eth0")
	for _, nd := range c.nodes {
		// Every error is answered, however many come. Who does not answer for an address is given up within the time that send waits.
		testutil.In(t, nd.ns, "sh", "-c", "echo 0 > /proc/sys/net/ipv4/icmp_ratemask; echo 0 > /proc/sys/net/ipv6/icmp/ratelimit; "+
			"for f in 4 6; do echo 1 > /proc/sys/net/ipv$f/neigh/eth0/mcast_solicit; echo 200 > /proc/sys/net/ipv$f/neigh/eth0/retrans_time_ms; done")
		for _, p := range nd.pods {
			w.frames(t, p.ns, func(in bool, frame []byte) {
				if in {
					w.see(frame, "delivered", "delivered to "+nd.podKey(p))
				}
			})
		}
		w.frames(t, nd.ns, func(in bool, frame []byte) {
			if !in {
				w.see(frame, "wire", "sent by eth0 on "+nd.name()+" from "+source(frame))
			}
		})
		w.local(t, nd)
		w.drops(t, nd)
	}
	w.frames(t, c.outside, func(in bool, frame []byte) {
		if in && isError(frame) {
			w.see(frame, "answer", "answered")
		}
	})
	return w
}

// see notes a marked packet. An ICMP error that a node made about it is its own kind; what the packet's receiver answers is
// no sighting.
func (w *watcher) see(frame []byte, kind, what string) {
	i := bytes.Index(frame, []byte(marker))
	if i < 0 || len(frame) < i+len(marker)+8 {
		return
	}
	if answer, about := answers(frame); answer {
		if !about || kind == "wire" || source(frame) == outside4 || source(frame) == outside6 {
			return // a stranger's opinion is none of the nodes'
		}
		kind, what = "answer", "answered"
	}
	id := binary.BigEndian.Uint64(frame[i+len(marker):])
	w.mu.Lock()
	defer w.mu.Unlock()
	w.seen[id] = append(w.seen[id], sighting{kind, what})
}

func isError(frame []byte) bool { answer, about := answers(frame); return answer && about }

// answers: the frame is an answer to a marked packet; about: an error that says it cannot go on.
func answers(frame []byte) (answer, about bool) {
	p := gopacket.NewPacket(frame, layers.LayerTypeEthernet, gopacket.NoCopy)
	if l, ok := p.Layer(layers.LayerTypeICMPv4).(*layers.ICMPv4); ok {
		return answers4(l.TypeCode)
	}
	if l, ok := p.Layer(layers.LayerTypeICMPv6).(*layers.ICMPv6); ok {
		return answers6(l.TypeCode)
	}
	return false, false
}

func answers4(c layers.ICMPv4TypeCode) (answer, about bool) {
	switch c.Type() {
	case layers.ICMPv4TypeEchoReply, layers.ICMPv4TypeRedirect:
		return true, false
	case layers.ICMPv4TypeDestinationUnreachable, layers.ICMPv4TypeTimeExceeded:
		return true, c.Type() == layers.ICMPv4TypeTimeExceeded || c.Code() != layers.ICMPv4CodePort
	}
	return false, false
}

func answers6(c layers.ICMPv6TypeCode) (answer, about bool) {
	switch {
	case c.Type() == layers.ICMPv6TypeEchoReply, c.Type() == layers.ICMPv6TypeRedirect:
		return true, false
	case c.Type() < 128:
		return true, c.Type() != layers.ICMPv6TypeDestinationUnreachable || c.Code() != layers.ICMPv6CodePortUnreachable
	}
	return false, false
}

func source(frame []byte) string {
	p := gopacket.NewPacket(frame, layers.LayerTypeEthernet, gopacket.NoCopy)
	if n := p.NetworkLayer(); n != nil {
		return n.NetworkFlow().Src().String()
	}
	return ""
}

// frames calls each for the frames of eth0 in a namespace.
func (w *watcher) frames(t *testing.T, ns *os.File, each func(in bool, frame []byte)) {
	t.Helper()
	var fd int
	if err := inNS(ns, func() (err error) {
		dev, err := net.InterfaceByName("eth0")
		if err != nil {
			return err
		}
		w.mac[ns] = dev.HardwareAddr
		all := uint16(unix.ETH_P_ALL)<<8 | uint16(unix.ETH_P_ALL)>>8
		if fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, int(all)); err != nil {
			return err
		}
		unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 8<<20)
		return unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: all, Ifindex: dev.Index})
	}); err != nil {
		t.Fatalf("watch frames: %v", err)
	}
	w.read(t, fd, func(b []byte, from unix.Sockaddr) {
		ll, ok := from.(*unix.SockaddrLinklayer)
		each(ok && ll.Pkttype != unix.PACKET_OUTGOING, b)
	})
}

// local sees what reaches a node's own processes: raw sockets are given a copy.
func (w *watcher) local(t *testing.T, nd *node) {
	t.Helper()
	for _, s := range []struct{ family, proto int }{
		{unix.AF_INET, unix.IPPROTO_TCP}, {unix.AF_INET, unix.IPPROTO_UDP}, {unix.AF_INET, unix.IPPROTO_ICMP},
		{unix.AF_INET6, unix.IPPROTO_TCP}, {unix.AF_INET6, unix.IPPROTO_UDP}, {unix.AF_INET6, unix.IPPROTO_ICMPV6},
	} {
		var fd int
		if err := inNS(nd.ns, func() (err error) {
			fd, err = unix.Socket(s.family, unix.SOCK_RAW|unix.SOCK_CLOEXEC, s.proto)
			return err
		}); err != nil {
			t.Fatal(err)
		}
		w.read(t, fd, func(b []byte, _ unix.Sockaddr) {
			if s.proto == unix.IPPROTO_UDP && ofTunnel(b, s.family == unix.AF_INET) {
				return // what is in it comes along by itself
			}
			// As a frame: sockets are given IPv4 with its header, IPv6 without.
			frame := append(make([]byte, 12, 14+40+len(b)), 0x08, 0)
			if s.family == unix.AF_INET6 {
				frame[12], frame[13] = 0x86, 0xdd
				ip := make([]byte, 40)
				ip[0], ip[6] = 0x60, byte(s.proto)
				binary.BigEndian.PutUint16(ip[4:], uint16(len(b)))
				frame = append(frame, ip...)
			}
			w.see(append(frame, b...), "host", "host "+nd.name())
		})
	}
}

// ofTunnel: the UDP packet that a raw socket was given is an encapsulated one.
func ofTunnel(b []byte, v4 bool) bool {
	if v4 && len(b) > 20 {
		b = b[20:]
	}
	return len(b) > 8 && slices.Contains(slices.Collect(maps.Values(tunnelPorts)), binary.BigEndian.Uint16(b[2:]))
}

func (w *watcher) read(t *testing.T, fd int, each func([]byte, unix.Sockaddr)) {
	unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Usec: 50_000})
	stop, done := make(chan struct{}), make(chan struct{})
	t.Cleanup(func() { close(stop); <-done; unix.Close(fd) })
	go func() {
		defer close(done)
		buf := make([]byte, 64<<10)
		for {
			n, from, err := unix.Recvfrom(fd, buf, 0)
			if err == nil {
				each(buf[:n], from)
				continue
			}
			select {
			case <-stop:
				return
			default:
			}
		}
	}()
}

// drops reads the node's drop events.
func (w *watcher) drops(t *testing.T, nd *node) {
	t.Helper()
	ring, err := nd.dp.OpenEvents()
	if err != nil {
		t.Fatal(err)
	}
	if err := nd.dp.SetMonitoring(datapath.Monitoring{Drops: true}); err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	t.Cleanup(func() { ring.Close(); <-done })
	go func() {
		defer close(done)
		for {
			record, err := ring.Read()
			if errors.Is(err, os.ErrClosed) {
				return
			}
			if err != nil || len(record) < monitor.HeadSize {
				continue
			}
			if m, err := monitor.Decode(record[monitor.HeadSize:]); err == nil {
				if d, ok := m.(monitor.Drop); ok {
					w.see(d.Packet, "dropped", fmt.Sprintf("dropped on %s: %s (%s:%d)", nd.name(), d.Reason(), bpf.FileName(d.File), d.Line))
				}
			}
		}
	}()
}

// send sends the tuples' packets and says what became of each.
func (w *watcher) send(t *testing.T, tuples []tuple) []string {
	t.Helper()
	first := w.next
	for _, tp := range tuples {
		payload := binary.BigEndian.AppendUint64([]byte(marker), w.next)
		w.next++
		if err := w.transmit(tp, payload); err != nil {
			t.Fatalf("send %s: %v", tp, err)
		}
		time.Sleep(2 * time.Millisecond)
	}
	time.Sleep(settle)
	w.mu.Lock()
	defer w.mu.Unlock()
	out := make([]string, len(tuples))
	for i := range tuples {
		out[i] = became(w.seen[first+uint64(i)])
	}
	return out
}

// became is the end of a packet that has been seen: on a wire last, if nowhere else.
func became(all []sighting) string {
	for _, kind := range []string{"dropped", "delivered", "host", "answer", "wire"} {
		var found []string
		for _, s := range all {
			if s.kind == kind && !slices.Contains(found, s.what) {
				found = append(found, s.what)
			}
		}
		if kind == "wire" && len(found) > 1 {
			found = found[len(found)-1:]
		}
		if len(found) > 0 {
			return strings.Join(found, " and ")
		}
	}
	return "nowhere"
}

// transmit sends a packet as a pod or a stranger puts it on the wire, or as a process of the node by a raw socket.
func (w *watcher) transmit(tp tuple, payload []byte) error {
	var dmac []byte
	switch {
	case tp.from.pod != nil:
		dmac = tp.from.pod.nodeMAC[:]
	case !tp.from.host:
		dmac = w.mac[w.c.nodes[tp.from.node].ns]
	}
	frame := rawFrame(tp, w.mac[tp.from.ns], dmac, payload)
	return inNS(tp.from.ns, func() error {
		if tp.from.host {
			return sendIP(tp, frame[14:])
		}
		dev, err := net.InterfaceByName("eth0")
		if err != nil {
			return err
		}
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		return unix.Sendto(fd, frame, 0, &unix.SockaddrLinklayer{Ifindex: dev.Index})
	})
}

func sendIP(tp tuple, packet []byte) error {
	family, to := unix.AF_INET6, unix.Sockaddr(&unix.SockaddrInet6{Addr: tp.dst.As16()})
	if tp.dst.Is4() {
		family, to = unix.AF_INET, &unix.SockaddrInet4{Addr: tp.dst.As4()}
	}
	fd, err := unix.Socket(family, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if err := unix.Sendto(fd, packet, 0, to); err != nil && !errors.Is(err, unix.ENETUNREACH) && !errors.Is(err, unix.EHOSTUNREACH) {
		return err
	}
	return nil
}

func rawFrame(tp tuple, smac, dmac, payload []byte) []byte {
	if dmac == nil {
		dmac = make([]byte, 6)
	}
	if smac == nil {
		smac = make([]byte, 6)
	}
	eth := &layers.Ethernet{SrcMAC: smac, DstMAC: dmac, EthernetType: layers.EthernetTypeIPv4}
	proto := map[string]layers.IPProtocol{"tcp": layers.IPProtocolTCP, "udp": layers.IPProtocolUDP, "icmp": layers.IPProtocolICMPv4}[tp.proto]
	all := []gopacket.SerializableLayer{eth}
	var ip gopacket.NetworkLayer
	size := 14 + 20
	if tp.dst.Is6() {
		if size = 14 + 40; proto == layers.IPProtocolICMPv4 {
			proto = layers.IPProtocolICMPv6
		}
		eth.EthernetType = layers.EthernetTypeIPv6
		l := &layers.IPv6{Version: 6, HopLimit: tp.ttl, NextHeader: proto, SrcIP: tp.src.AsSlice(), DstIP: tp.dst.AsSlice()}
		ip, all = l, append(all, l)
	} else {
		l := &layers.IPv4{Version: 4, TTL: tp.ttl, Protocol: proto, SrcIP: tp.src.AsSlice(), DstIP: tp.dst.AsSlice(), Flags: layers.IPv4DontFragment}
		ip, all = l, append(all, l)
	}
	switch {
	case tp.proto == "tcp":
		l := &layers.TCP{SrcPort: layers.TCPPort(tp.sport), DstPort: layers.TCPPort(tp.port), SYN: true, Window: 1000}
		l.SetNetworkLayerForChecksum(ip)
		all, size = append(all, l), size+20
	case tp.proto == "udp":
		l := &layers.UDP{SrcPort: layers.UDPPort(tp.sport), DstPort: layers.UDPPort(tp.port)}
		l.SetNetworkLayerForChecksum(ip)
		all, size = append(all, l), size+8
	case tp.dst.Is6():
		l := &layers.ICMPv6{TypeCode: layers.CreateICMPv6TypeCode(layers.ICMPv6TypeEchoRequest, 0)}
		l.SetNetworkLayerForChecksum(ip)
		all, size = append(all, l, &layers.ICMPv6Echo{Identifier: tp.sport}), size+8
	default:
		all, size = append(all, &layers.ICMPv4{TypeCode: layers.CreateICMPv4TypeCode(layers.ICMPv4TypeEchoRequest, 0), Id: tp.sport}), size+8
	}
	buf := gopacket.NewSerializeBuffer()
	if err := gopacket.SerializeLayers(buf, gopacket.SerializeOptions{FixLengths: true, ComputeChecksums: true}, append(all, gopacket.Payload(payload))...); err != nil {
		panic(err)
	}
	return buf.Bytes()[:size+len(payload)]
}

// mapHash is everything a map holds.
type mapHash struct {
	name string
	sum  [32]byte
}

// hashes reads all live maps of all nodes, rings with their positions.
func hashes(t *testing.T, c *cluster) (all []mapHash) {
	t.Helper()
	for _, nd := range c.nodes {
		for _, f := range nd.dp.Maps() {
			m := nd.dp.Map(f.Name)
			h := mapHash{name: f.Name + " of " + nd.name()}
			if m.Type() == ebpf.RingBuf {
				b, err := unix.Mmap(m.FD(), int64(os.Getpagesize()), os.Getpagesize()+int(m.MaxEntries()), unix.PROT_READ, unix.MAP_SHARED)
				if err != nil {
					t.Fatalf("%s: %v", h.name, err)
				}
				h.sum = sha256.Sum256(b)
				unix.Munmap(b)
			} else {
				h.sum = rowsHash(t, m)
			}
			all = append(all, h)
		}
	}
	return all
}

// rowsHash does not depend on the rows' order.
func rowsHash(t *testing.T, m *ebpf.Map) [32]byte {
	t.Helper()
	rows := map[string]string{}
	var key []byte
	for {
		var after any
		if key != nil {
			after = key
		}
		k, err := m.NextKeyBytes(after)
		if err != nil {
			t.Fatal(err)
		}
		if k == nil {
			break
		}
		key = k
		var v []byte
		if m.Type() == ebpf.PerCPUHash || m.Type() == ebpf.PerCPUArray {
			perCPU := make([][]byte, ebpf.MustPossibleCPU())
			if err := m.Lookup(k, &perCPU); err != nil {
				t.Fatal(err)
			}
			v = bytes.Join(perCPU, nil)
		} else if v, err = m.LookupBytes(k); err != nil {
			t.Fatal(err)
		}
		rows[string(k)] = string(v)
	}
	h := sha256.New()
	for _, k := range slices.Sorted(maps.Keys(rows)) {
		fmt.Fprintf(h, "%d %s%s", len(k), k, rows[k])
	}
	return [32]byte(h.Sum(nil))
}
