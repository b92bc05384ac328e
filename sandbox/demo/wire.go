// SPDX-License-Identifier: Apache-2.0

package demo

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
	"github.com/gopacket/gopacket/pcapgo"
)

// runner runs a command somewhere: on a node, in a pod.
type runner func(ctx context.Context, argv ...string) (string, error)

func (w *world) onNode(node string) runner {
	return func(ctx context.Context, argv ...string) (string, error) { return w.c.Exec(ctx, node, argv...) }
}

func (w *world) inPod(p pod) runner {
	return func(ctx context.Context, argv ...string) (string, error) { return w.in(ctx, p, argv...) }
}

// capture is a tcpdump on a device of a node or pod.
type capture struct {
	run          runner
	device, file string
	ended        bool
}

// captureLimit ends a capture that nobody could end.
const captureLimit = "120"

// startCapture returns once packets are captured. On an error nothing runs.
func startCapture(ctx context.Context, run runner, device, name, filter string) (*capture, error) {
	c := &capture{run: run, device: device, file: "/tmp/wire." + name}
	start := fmt.Sprintf("timeout %s tcpdump -Z root --immediate-mode -U -i %s -n -w %s '%s' >%[3]s.log 2>&1 & echo $! >%[3]s.pid; until grep -q listening %[3]s.log; do kill -0 $! || { cat %[3]s.log >&2; exit 1; }; sleep 0.1; done", captureLimit, device, c.file, filter)
	if _, err := run(ctx, "timeout", "20", "sh", "-c", start); err != nil {
		c.end(ctx)
		return nil, fmt.Errorf("capture on %s: %w", device, err)
	}
	return c, nil
}

// end ends the capture, whatever became of it and of ctx, and removes its files. Called again it does nothing.
func (c *capture) end(ctx context.Context) {
	if c.ended {
		return
	}
	c.ended = true
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
	defer cancel()
	_, _ = c.run(ctx, "sh", "-c", fmt.Sprintf("[ ! -s %s.pid ] || kill $(cat %[1]s.pid); rm -f %[1]s %[1]s.*", c.file))
}

// packets ends the capture and returns what it has.
func (c *capture) packets(ctx context.Context) ([]gopacket.Packet, error) {
	defer c.end(ctx)
	out, err := c.run(ctx, "sh", "-c", fmt.Sprintf("sleep 0.2; kill $(cat %s.pid); sleep 0.2; rm %[1]s.pid; base64 %[1]s", c.file))
	if err != nil {
		return nil, err
	}
	raw, err := base64.StdEncoding.DecodeString(strings.Join(strings.Fields(out), ""))
	if err != nil {
		return nil, fmt.Errorf("capture on %s: %w", c.device, err)
	}
	r, err := pcapgo.NewReader(bytes.NewReader(raw))
	if err != nil {
		return nil, fmt.Errorf("capture on %s: %w", c.device, err)
	}
	var packets []gopacket.Packet
	for {
		data, _, err := r.ReadPacketData()
		if err != nil { // the end, or a packet that was being written
			return packets, nil
		}
		packets = append(packets, gopacket.NewPacket(data, r.LinkType(), gopacket.Default))
	}
}

// frame is an echo request or reply as it lies in an Ethernet frame.
type frame struct {
	reply      bool
	src, dst   netip.Addr
	macs       string // "source > destination"
	ttl        uint8
	tunnelled  bool
	vni        uint32
	port       uint16 // of the outer UDP header
	oSrc, oDst netip.Addr
}

// echoes are the frames of a capture that carry an echo, be it in a tunnel.
func echoes(packets []gopacket.Packet) []frame {
	var out []frame
	for _, p := range packets {
		f, ok := innermost(p)
		if udp, is := p.Layer(layers.LayerTypeUDP).(*layers.UDP); is {
			inner := gopacket.NewPacket(udp.Payload, layers.LayerTypeVXLAN, gopacket.Default)
			outer := f
			if f, ok = innermost(inner); ok {
				f.tunnelled, f.vni, f.port = true, inner.Layer(layers.LayerTypeVXLAN).(*layers.VXLAN).VNI, uint16(udp.DstPort)
				f.oSrc, f.oDst = outer.src, outer.dst
			}
		}
		if ok {
			out = append(out, f)
		}
	}
	return out
}

// innermost reads addresses and TTL, and whether there is an echo.
func innermost(p gopacket.Packet) (f frame, ok bool) {
	for _, l := range p.Layers() {
		switch l := l.(type) {
		case *layers.Ethernet:
			f.macs = l.SrcMAC.String() + " > " + l.DstMAC.String()
		case *layers.IPv4:
			f.src, _ = netip.AddrFromSlice(l.SrcIP)
			f.dst, _ = netip.AddrFromSlice(l.DstIP)
			f.ttl = l.TTL
		case *layers.IPv6:
			f.src, _ = netip.AddrFromSlice(l.SrcIP)
			f.dst, _ = netip.AddrFromSlice(l.DstIP)
			f.ttl = l.HopLimit
		case *layers.ICMPv4:
			f.reply, ok = l.TypeCode.Type() == layers.ICMPv4TypeEchoReply, l.TypeCode.Type() == layers.ICMPv4TypeEchoReply || l.TypeCode.Type() == layers.ICMPv4TypeEchoRequest
		case *layers.ICMPv6:
			f.reply, ok = l.TypeCode.Type() == layers.ICMPv6TypeEchoReply, l.TypeCode.Type() == layers.ICMPv6TypeEchoReply || l.TypeCode.Type() == layers.ICMPv6TypeEchoRequest
		}
	}
	return f, ok
}

// identities are the numbers that `lash identity list` of a node gives the demo's pods, by their label app.
func (w *world) identities(ctx context.Context, node string) (map[string]uint32, error) {
	out, err := w.lashOn(ctx, node, "identity", "list", "-o", "json")
	if err != nil {
		return nil, err
	}
	var list []struct {
		ID     uint32
		Labels []string
	}
	if err := json.Unmarshal([]byte(out), &list); err != nil {
		return nil, err
	}
	ids := map[string]uint32{}
	for _, id := range list {
		if !slices.Contains(id.Labels, "k8s:io.kubernetes.pod.namespace=demo") {
			continue
		}
		for _, l := range id.Labels {
			app, ok := strings.CutPrefix(l, "k8s:app=")
			if !ok {
				continue
			}
			if ids[app] != 0 {
				return nil, fmt.Errorf("app=%s in namespace demo has the identities %d and %d", app, ids[app], id.ID)
			}
			ids[app] = id.ID
		}
	}
	return ids, nil
}

// onTheWire captures while pods of one node talk to each other and to a pod of another node: in both pods, on the
// devices of both nodes, and on their tunnel devices.
func (w *world) onTheWire(mode, f string) check {
	name := map[string]string{
		"vxlan":  "VNIs are the identities, the pods' own MAC addresses inside, TTL 63 at delivery, UDP 8472; nothing of one node's pods",
		"native": "the pods' packets as they are; nothing of one node's pods",
	}[mode]
	return check{"on the wire, " + f + ": " + name, func(ctx context.Context) error { return w.captured(ctx, mode, f) }}
}

func (w *world) captured(ctx context.Context, mode, f string) error {
	src, near, far := w.client["n1"], w.web["n1"], w.web["n2"]
	from, to := src.addrs[f], far.addrs[f]
	places := []struct {
		name, device string
		run          runner
	}{
		{"source pod", "eth0", w.inPod(src)}, {"destination pod", "eth0", w.inPod(far)},
		{"n1", "eth0", w.onNode("n1")}, {"n2", "eth0", w.onNode("n2")},
		{"n1 tunnel", "lash_vxlan", w.onNode("n1")}, {"n2 tunnel", "lash_vxlan", w.onNode("n2")},
	}
	if mode != "vxlan" {
		places = places[:4]
	}
	running := make([]*capture, len(places))
	defer func() {
		_ = atOnce(len(places), func(i int) error {
			if running[i] != nil {
				running[i].end(ctx)
			}
			return nil
		})
	}()
	var ids map[string]uint32
	err := atOnce(len(places)+1, func(i int) (err error) {
		if i == len(places) {
			ids, err = w.identities(ctx, "n1")
			return err
		}
		p := places[i]
		running[i], err = startCapture(ctx, p.run, p.device, f+"."+strings.ReplaceAll(p.name, " ", "-"), fmt.Sprintf("udp port 8472 or host %s", from))
		return err
	})
	if err != nil {
		return err
	}
	_, err = w.in(ctx, src, "sh", "-c", fmt.Sprintf("for a in %s %s; do ping -n -c 2 -i 0.2 -W 2 $a || exit 1; done", near.addrs[f], to))
	captures := make([][]gopacket.Packet, len(places))
	if err = errors.Join(err, atOnce(len(places), func(i int) (err error) { captures[i], err = running[i].packets(ctx); return err })); err != nil {
		return err
	}
	got := map[string][]frame{}
	for i, p := range places {
		for _, e := range echoes(captures[i]) {
			switch {
			case (e.src == near.addrs[f] || e.dst == near.addrs[f]) && p.name != "source pod":
				err = errors.Join(err, fmt.Errorf("%s: %s > %s stays on its node and was seen", p.name, e.src, e.dst))
			case e.src == from && e.dst == to || e.src == to && e.dst == from:
				got[p.name] = append(got[p.name], e)
			}
		}
	}
	return errors.Join(err, judge(mode, got, map[bool]uint32{false: ids["client"], true: ids["web"]}))
}

// atOnce does n things at the same time.
func atOnce(n int, do func(i int) error) error {
	errs := make([]error, n)
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() { errs[i] = do(i) })
	}
	wg.Wait()
	return errors.Join(errs...)
}

// judge compares what was seen of two pings between pods of different nodes with what the mode has. The reply's sender is
// the destination pod: request and reply are the same thing in two directions.
func judge(mode string, got map[string][]frame, ids map[bool]uint32) error {
	var errs []error
	wrong := func(place string, f frame, format string, args ...any) {
		errs = append(errs, fmt.Errorf("%s, reply %v: %s", place, f.reply, fmt.Sprintf(format, args...)))
	}
	sent := map[bool]frame{} // as the pods made them
	for place, reply := range map[string]bool{"source pod": false, "destination pod": true} {
		for _, f := range got[place] {
			if f.reply == reply {
				sent[reply] = f
			}
		}
	}
	tunnel := mode == "vxlan"
	for place, frames := range got {
		inPod, node := strings.HasSuffix(place, "pod"), strings.HasPrefix(place, "n") && !strings.HasSuffix(place, "tunnel")
		for _, f := range frames {
			own := sent[f.reply]
			arrived := inPod && (place == "destination pod") != f.reply
			switch {
			case node && tunnel != f.tunnelled:
				wrong(place, f, "encapsulated: %v", f.tunnelled)
			case node && tunnel && (f.vni != ids[f.reply] || f.port != 8472 || !isNode(f.oSrc, !f.reply) || !isNode(f.oDst, f.reply)):
				wrong(place, f, "VNI %d from %s to %s port %d, want %d (lash identity list) between the nodes, port 8472", f.vni, f.oSrc, f.oDst, f.port, ids[f.reply])
			case tunnel && !inPod && (f.macs != own.macs || f.ttl != own.ttl):
				wrong(place, f, "inside is %s with TTL %d, the pod sent %s with %d", f.macs, f.ttl, own.macs, own.ttl)
			case arrived && tunnel && (f.ttl != 63 || own.ttl != 64):
				wrong(place, f, "sent with TTL %d, delivered with %d, want 64 and 63", own.ttl, f.ttl)
			case arrived && f.macs != turned(sent[!f.reply].macs):
				wrong(place, f, "delivered %s, want the receiving pod's own pair %s", f.macs, turned(sent[!f.reply].macs))
			}
		}
		for _, reply := range []bool{false, true} {
			n := 0
			for _, f := range frames {
				if f.reply == reply {
					n++
				}
			}
			if n != 2 {
				errs = append(errs, fmt.Errorf("%s: reply %v was seen %d times, want 2", place, reply, n))
			}
		}
	}
	if want := map[bool]int{true: 6, false: 4}[tunnel]; len(got) != want {
		errs = append(errs, fmt.Errorf("packets at %d places, want %d", len(got), want))
	}
	return errors.Join(errs...)
}

// isNode: a is n1's underlay address, or n2's.
func isNode(a netip.Addr, first bool) bool {
	name := map[bool]string{true: "n1", false: "n2"}[first]
	return a == nodeAddr(name, family(a))
}

// turned is the pair of MAC addresses of the other direction.
func turned(macs string) string {
	a, b, _ := strings.Cut(macs, " > ")
	return b + " > " + a
}
