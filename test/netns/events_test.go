// SPDX-License-Identifier: Apache-2.0

package netns

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/lash-net/lash/bpf"
	"github.com/lash-net/lash/internal/datapath"
	"github.com/lash-net/lash/internal/events"
	"github.com/lash-net/lash/internal/model"
	"github.com/lash-net/lash/internal/monitor"
)

// listening is what is told while a test listens to a node.
type listening struct {
	hub    *events.Hub
	frames chan []byte
	got    []event
	lost   uint64
	dp     *datapath.Datapath
}

type event struct {
	cpu int
	monitor.Message
}

var everything = datapath.Monitoring{
	Drops: true, Traces: true, Verdicts: true, Aggregation: bpf.AggregateMedium, Interval: 5 * time.Second, Flags: 0x07, // FIN, SYN, RST
}

// heldRing is a ring whose reader does not come to read before it is let.
type heldRing struct {
	*datapath.Events
	let chan struct{}
}

func (r heldRing) Read() ([]byte, error) {
	<-r.let
	return r.Events.Read()
}

// listen makes the node tell what m says until the test ends.
func (nd *node) listen(t *testing.T, m datapath.Monitoring) *listening {
	t.Helper()
	let := make(chan struct{})
	close(let)
	return nd.listenHeld(t, m, let)
}

func (nd *node) listenHeld(t *testing.T, m datapath.Monitoring, let chan struct{}) *listening {
	t.Helper()
	l := &listening{frames: make(chan []byte, 1<<16), dp: nd.dp}
	ring, err := nd.dp.OpenEvents()
	if err != nil {
		t.Fatal(err)
	}
	l.hub = events.New(heldRing{ring, let}, func(on bool) error {
		if !on {
			return nd.dp.SetMonitoring(datapath.Monitoring{})
		}
		return nd.dp.SetMonitoring(m)
	}, slog.New(slog.DiscardHandler))
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 2)
	go func() { ended <- l.hub.Run(ctx) }()
	go func() {
		ended <- l.hub.Listen(ctx, func(frames []byte) error { l.frames <- frames; return nil })
	}()
	t.Cleanup(func() {
		cancel()
		if err := errors.Join(<-ended, <-ended, ring.Close()); err != nil {
			t.Error(err)
		}
	})
	for l.hub.Stats().Listeners == 0 {
		time.Sleep(time.Millisecond)
	}
	return l
}

// settle takes what has been told until nothing comes for a while.
func (l *listening) settle(t *testing.T) []event {
	t.Helper()
	for {
		select {
		case b := <-l.frames:
			for r := monitor.NewReader(bytes.NewReader(b)); ; {
				e, err := r.Next()
				if err != nil {
					break
				}
				if len(e.Data) == 0 {
					l.lost += uint64(e.Lost)
					continue
				}
				m, err := monitor.Decode(bytes.Clone(e.Data))
				if err != nil {
					t.Fatal(err)
				}
				l.got = append(l.got, event{e.CPU, m})
			}
		case <-time.After(400 * time.Millisecond):
			return l.got
		}
	}
}

// print is what the monitor would write about the events that are chosen.
func print(nd *node, v monitor.Verbosity, got []event, choose func(monitor.Message) bool) string {
	var b strings.Builder
	p := monitor.NewPrinter(&b)
	p.Verbosity = v
	p.Link = func(i uint32) string {
		name := fmt.Sprint(i)
		inNS(nd.ns, func() error {
			if l, err := net.InterfaceByIndex(int(i)); err == nil {
				name = l.Name
			}
			return nil
		})
		return name
	}
	for _, e := range got {
		if choose(e.Message) {
			p.Print(e.cpu, e.Message)
		}
	}
	return b.String()
}

// about tells whether a message is about pods, not about the neighbours of the nodes.
func about(addrs ...netip.Addr) func(monitor.Message) bool {
	return func(m monitor.Message) bool {
		var packet []byte
		switch m := m.(type) {
		case monitor.Trace:
			packet = m.Packet
		case monitor.Drop:
			packet = m.Packet
		case monitor.Debug:
			return true
		}
		for _, a := range addrs {
			if bytes.Contains(packet, a.AsSlice()) {
				return true
			}
		}
		return false
	}
}

// Each line of the seeds' sequence, in order, on both nodes. Natively the packet goes to the network, not to the overlay.
func TestOnePingIsToldOnBothNodes(t *testing.T) {
	for _, tunnel := range []string{"", "vxlan"} {
		t.Run("tunnel="+tunnel, func(t *testing.T) {
			c := newCluster(t, options{podsPerNode: 1, tunnel: tunnel})
			near, far := c.nodes[0], c.nodes[1]
			a, b := near.pods[0], far.pods[0]
			near.knows(t, far, tunnel != "")
			far.knows(t, near, tunnel != "")
			m := everything
			m.Debug = true
			source, destination := near.listen(t, m), far.listen(t, m)
			for _, fam := range []struct{ from, to netip.Addr }{{a.ip4, b.ip4}, {a.ip6, b.ip6}} {
				source.got, destination.got = nil, nil
				if out, err := try(a.ns, "ping", "-n", "-c", "1", "-W", "2", fam.to.String()); err != nil {
					t.Fatalf("%v\n%s", err, out)
				}
				// What each node says of a packet that leaves it, and of one that comes.
				leaves := func(n *node, from, to netip.Addr, src, dst model.Identity, echo, state string) []string {
					point, device := "to-network", "eth0"
					lines := connection(10, from, to, "egress", verdicts[state], src, dst)
					if tunnel != "" {
						other := c.nodes[2-n.n].ip4.As4()
						point, device = "to-overlay", "lash_tunnel"
						lines = append(lines, fmt.Sprintf("FROM 10 DEBUG: Encapsulating to node %d (%#[1]x) from seclabel %d", binary.BigEndian.Uint32(other[:]), src))
					}
					return append(lines, dissected(echo, fmt.Sprintf("FROM 10 %s: N bytes (N captured), state %s, interface %s, , identity %d->%d, orig-ip %s",
						point, state, device, src, dst, unspecified(to)))...)
				}
				comes := func(from, to netip.Addr, src, dst model.Identity, echo, state string) []string {
					var lines []string
					if tunnel != "" {
						lines = append(lines, fmt.Sprintf("FROM 0 DEBUG: Tunnel decap: id=%d flowlabel=0", src))
					}
					lines = append(lines, fmt.Sprintf("FROM 0 DEBUG: Attempting local delivery for container id 10 from seclabel %d", src))
					lines = append(lines, connection(10, from, to, "ingress", verdicts[state], src, dst)...)
					return append(lines, dissected(echo, fmt.Sprintf("FROM 10 to-endpoint: N bytes (N captured), state %s, interface lxc10, , identity %d->%d, orig-ip %s, to endpoint 10",
						state, src, dst, from))...)
				}
				for _, node := range []struct {
					*node
					*listening
					want []string
				}{
					{near, source, slices.Concat(leaves(near, fam.from, fam.to, a.identity, b.identity, "Request", "new"), comes(fam.to, fam.from, b.identity, a.identity, "Reply", "reply"))},
					{far, destination, slices.Concat(comes(fam.from, fam.to, a.identity, b.identity, "Request", "new"), leaves(far, fam.to, fam.from, b.identity, a.identity, "Reply", "reply"))},
				} {
					got := strings.TrimSpace(print(node.node, monitor.Dissected, node.settle(t), about(fam.from, fam.to)))
					if want := strings.Join(node.want, "\n"); shape(got) != want {
						t.Errorf("node %d told\n%s\nof the shape\n%s\nwant\n%s", node.n, got, shape(got), want)
					}
				}
			}
		})
	}
}

var verdicts = map[string]string{"new": "New", "established": "Established", "reply": "Reply"}

// knows gives a node the identities of another's pods.
func (nd *node) knows(t *testing.T, other *node, tunnel bool) {
	t.Helper()
	nd.do(t, "ipcache", func() error {
		for _, p := range other.pods {
			for _, a := range []netip.Addr{p.ip4, p.ip6} {
				row := model.IPCacheEntry{Identity: p.identity, Node: other.ip4, Tunnel: tunnel}
				if err := nd.dp.IPCache().Put(context.Background(), netip.PrefixFrom(a, a.BitLen()), row); err != nil {
					return err
				}
			}
		}
		return nil
	})
}

func unspecified(a netip.Addr) string {
	if a.Is4() {
		return "0.0.0.0"
	}
	return "::"
}

// shape puts names in the place of what differs from run to run.
func shape(lines string) string {
	for _, r := range [][2]string{
		{`CPU \d\d: MARK 0x[0-9a-f]+ `, ""}, {`\d+ bytes \(\d+ captured\)`, "N bytes (N captured)"}, {`(src|dst)=(\S+):\d+`, "$1=$2:PORT"},
		{`lifetime=\d+`, "lifetime=N"}, {`(?m)^-{78}$`, "------"},
		{`(?m)^ICMPv[46]	\{Contents=.* TypeCode=Echo(Request|Reply) .*\}$`, "ICMP $1"},
		{`(?m)^(Ethernet|IPv4|IPv6)	\{Contents=.* Payload=.*\}$`, "$1"},
	} {
		lines = regexp.MustCompile(r[0]).ReplaceAllString(lines, r[1])
	}
	return lines
}

// connection is what debugging says of a connection that was looked up.
func connection(ep uint16, src, dst netip.Addr, direction, verdict string, srcIdentity, dstIdentity model.Identity) []string {
	v6, flags := src.Is6(), 0
	last := func(a netip.Addr) string {
		if !v6 {
			return a.String()
		}
		b := a.AsSlice()
		return fmt.Sprintf("[::%x:%x]", uint16(b[12])<<8|uint16(b[13]), uint16(b[14])<<8|uint16(b[15]))
	}
	proto := map[bool]int{false: 1, true: 58}[v6]
	if direction == "egress" {
		flags = 1
	}
	lines := []string{
		fmt.Sprintf("Conntrack lookup 1/2: src=%s:PORT dst=%s:PORT", last(src), last(dst)),
		fmt.Sprintf("Conntrack lookup 2/2: nexthdr=%d flags=%d", proto, flags),
	}
	if verdict != "New" {
		lines = append(lines, "CT entry found lifetime=N, revnat=0")
	}
	lines = append(lines, "CT verdict: "+verdict+", revnat=0")
	if direction == "egress" {
		of := "addr=" + last(dst)
		if v6 {
			of = "addr.p4=" + last(dst)
		}
		lines = append(lines, fmt.Sprintf("Successfully mapped %s to identity=%d", of, dstIdentity))
	}
	if verdict == "New" {
		lb := " lb=0.0.0.0"
		if v6 {
			lb = ""
		}
		lines = append(lines, fmt.Sprintf("Conntrack create: proxy-port=0 revnat=0 src-identity=%d%s", srcIdentity, lb))
	}
	for i := range lines {
		lines[i] = fmt.Sprintf("FROM %d DEBUG: %s", ep, lines[i])
	}
	return lines
}

// dissected is a packet's block.
func dissected(echo, line string) []string {
	ip := "IPv4"
	if strings.Contains(line, "orig-ip ::") || strings.Contains(line, "orig-ip fd") {
		ip = "IPv6"
	}
	return []string{"------", "Ethernet", ip, "ICMP " + echo, line}
}

func TestDropIsToldWithReasonAndPlace(t *testing.T) {
	c := newCluster(t, options{podsPerNode: 2})
	n := c.nodes[0]
	a, b := n.pods[0], n.pods[1]
	l := n.listen(t, everything)
	ip(t, a.ns, "addr add 10.0.1.77/32 dev eth0")
	try(a.ns, "ping", "-n", "-c", "1", "-W", "1", "-I", "10.0.1.77", b.ip4.String())
	got := print(n, monitor.Brief, l.settle(t), func(m monitor.Message) bool { return m.Type() == monitor.TypeDrop })
	want := `^xx drop \(Invalid source ip\) flow 0x[0-9a-f]+ to endpoint 11, ifindex lxc10, file pod\.c:\d+, , identity world-ipv4->1011: 10\.0\.1\.77 -> 10\.0\.1\.11 icmp EchoRequest\n$`
	if !regexp.MustCompile(want).MatchString(got) {
		t.Errorf("got  %swant %s", got, want)
	}
}

// short is the lines about a connection without what differs from run to run.
func short(nd *node, got []event, addrs ...netip.Addr) []string {
	var lines []string
	for line := range strings.Lines(print(nd, monitor.Brief, got, about(addrs...))) {
		line = regexp.MustCompile(` flow 0x[0-9a-f]+ , identity \S+ `).ReplaceAllString(strings.TrimSpace(line), " ")
		point, _, _ := strings.Cut(line, " ifindex")
		packet := line[strings.LastIndex(line, ": ")+2:]
		lines = append(lines, point+": "+packet[strings.LastIndex(packet, " tcp")+1:])
	}
	return lines
}

func TestAggregationChangesWhileProgramsRun(t *testing.T) {
	c := newCluster(t, options{podsPerNode: 1})
	n := c.nodes[0]
	a, far := n.pods[0], c.nodes[1].pods[0]
	l := n.listen(t, everything)
	at := serve(t, far.ns, far.ip4)
	err := inNS(a.ns, func() error {
		conn, err := net.DialTimeout("tcp", at.String(), 3*time.Second)
		if err != nil {
			return err
		}
		defer conn.Close()
		buf := make([]byte, 1<<10)
		if _, err := conn.Read(buf); err != nil { // the server's greeting
			return err
		}
		round := func() []string {
			t.Helper()
			l.got = nil
			if _, err := conn.Write([]byte("x")); err != nil {
				t.Fatal(err)
			}
			if _, err := conn.Read(buf); err != nil {
				t.Fatal(err)
			}
			time.Sleep(60 * time.Millisecond) // the delayed acknowledgement
			return short(n, l.settle(t), a.ip4, far.ip4)
		}
		set := func(aggregation uint8, interval time.Duration) {
			m := everything
			m.Aggregation, m.Interval = aggregation, interval
			if err := l.dp.SetMonitoring(m); err != nil {
				t.Fatal(err)
			}
		}
		if got, want := short(n, l.settle(t), a.ip4, far.ip4), []string{"-> network state new: tcp SYN", "-> endpoint 10 state reply: tcp SYN, ACK"}; !slices.Equal(got, want) {
			t.Errorf("medium, connect: %q, want %q", got, want)
		}
		if got := round(); len(got) != 0 {
			t.Errorf("medium, established: %q", got)
		}
		set(bpf.AggregateLow, 0)
		if got := round(); !slices.Contains(got, "-> network state established: tcp ACK") || !slices.Contains(got, "-> endpoint 10 state reply: tcp ACK") || slices.ContainsFunc(got, isArrival) {
			t.Errorf("low: %q", got)
		}
		set(bpf.AggregateNone, 0)
		if got := round(); !slices.Contains(got, "<- endpoint 10 state unknown: tcp ACK") || !slices.Contains(got, "<- network state unknown: tcp ACK") || !slices.Contains(got, "-> endpoint 10 state reply: tcp ACK") {
			t.Errorf("none: %q", got)
		}
		set(bpf.AggregateMaximum, time.Millisecond)
		if got := round(); len(got) != 0 {
			t.Errorf("maximum: %q", got)
		}
		set(bpf.AggregateMedium, 5*time.Second)
		round()
		conn.Close()
		time.Sleep(50 * time.Millisecond)
		if got := short(n, l.settle(t), a.ip4, far.ip4); !slices.Contains(got, "-> network state established: tcp ACK, FIN") || !slices.Contains(got, "-> endpoint 10 state reply: tcp ACK, FIN") {
			t.Errorf("medium, close: %q", got)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

func isArrival(line string) bool { return strings.HasPrefix(line, "<-") }

// The interval runs on while nothing else is told.
func TestIntervalTellsAgain(t *testing.T) {
	c := newCluster(t, options{podsPerNode: 1})
	n := c.nodes[0]
	a, far := n.pods[0], c.nodes[1].pods[0]
	m := everything
	m.Interval = 200 * time.Millisecond
	l := n.listen(t, m)
	if out, err := try(a.ns, "ping", "-n", "-c", "21", "-i", "0.05", "-W", "2", far.ip4.String()); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	if got := short(n, l.settle(t), a.ip4, far.ip4); len(got) < 6 || len(got) > 14 {
		t.Errorf("a second of pings every 50 ms, told every 200 ms in both directions: %d events\n%s", len(got), strings.Join(got, "\n"))
	}
}

// What comes to the network by way of the stack is told where it leaves, too.
func TestLegacyHostRoutingTellsStackAndNetwork(t *testing.T) {
	c := newCluster(t, options{podsPerNode: 1, legacy: true})
	near, far := c.nodes[0], c.nodes[1]
	a, b := near.pods[0], far.pods[0]
	source, destination := near.listen(t, everything), far.listen(t, everything)
	if out, err := try(a.ns, "ping", "-n", "-c", "1", "-W", "2", b.ip4.String()); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	for _, tc := range []struct {
		*node
		*listening
		want []string
	}{
		{near, source, []string{"-> stack state new", "-> network state new", "-> endpoint 10 state reply"}},
		{far, destination, []string{"-> endpoint 10 state new", "-> stack state reply", "-> network state reply"}},
	} {
		var got []string
		for _, line := range short(tc.node, tc.settle(t), a.ip4, b.ip4) {
			point, _, _ := strings.Cut(line, ":")
			got = append(got, point)
		}
		if !slices.Equal(got, tc.want) {
			t.Errorf("node %d told %q, want %q", tc.n, got, tc.want)
		}
	}
}
