// SPDX-License-Identifier: Apache-2.0

package explain

import (
	"fmt"
	"net/netip"
	"strings"

	"github.com/lash-net/lash/api/agent"
	"github.com/lash-net/lash/bpf"
	"github.com/lash-net/lash/internal/datapath"
	"github.com/lash-net/lash/internal/datapath/netdev"
	"github.com/lash-net/lash/internal/model"
	"github.com/lash-net/lash/internal/monitor"
)

// observe takes over what the program told: why it took its path, and its events. The drop, if it is one.
func observe(s *agent.ExplainStep, out *datapath.DryOutcome) (drop *monitor.Drop) {
	for _, reason := range out.Slow {
		if fast(reason) {
			s.Why = append(s.Why, "Fast path: the record's decision holds")
			continue
		}
		s.Why = append(s.Why, datapath.SlowText(reason))
	}
	for _, data := range out.Events {
		switch m, err := monitor.Decode(data); m := m.(type) {
		case monitor.Trace:
			point := m.Point()
			if m.Reason != bpf.TraceUnknown {
				point += ", " + m.State()
			}
			s.Points = append(s.Points, fmt.Sprintf("%s, identity %d -> %d", point, m.SrcIdentity, m.DstIdentity))
		case monitor.Debug:
			s.Points = append(s.Points, m.Text())
		case monitor.Capture:
			s.Points = append(s.Points, m.Text())
		case monitor.Drop:
			drop = &m
			s.Points = append(s.Points, "drop, "+m.Reason())
		default:
			if err != nil {
				s.Points = append(s.Points, err.Error())
			}
		}
	}
	return drop
}

func fast(reason int) bool { return reason == bpf.SlowNot || reason == bpf.SlowReport }

// lookup finds the rows again that a program has met.
type lookup struct {
	w             *walk
	in            datapath.DryPacket
	out           *datapath.DryOutcome
	before, after header
	drop          uint8 // its reason; 0: it was not dropped
}

// entries are the rows in the order the program meets them. The one that decides is told by the outcome.
func (l lookup) entries() []agent.ExplainEntry {
	var all []agent.ExplainEntry
	add := func(e *agent.ExplainEntry) {
		if e != nil {
			all = append(all, *e)
		}
	}
	dropped := l.out.Verdict == datapath.VerdictDrop
	followed := false
	for _, reason := range l.out.Slow {
		followed = followed || fast(reason)
	}
	src, dst := l.before.src.Addr(), l.before.dst.Addr()
	switch l.in.Program {
	case "from_container":
		if !followed {
			own := l.iface()
			add(own)
			if dropped && own != nil && own.Decides {
				return all
			}
		}
	case "from_overlay":
		if !followed {
			add(l.ipcache(l.in.Tunnel.Sender, dropped))
			if e := l.endpoint(src, true); e != nil {
				add(e)
				return all
			}
		}
	case "to_netdev":
		if l.in.Mark&markMask == markDone {
			return []agent.ExplainEntry{{Map: "mark", Key: fmt.Sprintf("%#x", l.in.Mark), Value: "a program of this node has finished with it", Decides: true}}
		}
		add(l.endpoint(src, false))
		add(l.device(l.in.Ifindex))
	case "from_netdev":
		if l.out.NATOwner != nil {
			value := "answers a masqueraded connection"
			if c := l.out.Conn; c != nil && c.Flags&bpf.ConnDNAT != 0 {
				value = strings.TrimSpace("answers a connection to " + l.w.names.servicePort(c.Service))
			}
			add(&agent.ExplainEntry{Map: "lash_nat", Key: fmt.Sprintf("%s > %s", l.before.src, l.before.dst), Value: value, Decides: true})
		}
	}
	add(l.conn(followed))
	if followed || l.in.Program == "to_netdev" {
		return all
	}
	asked, decided := l.services(l.drop)
	all = append(all, asked...)
	if decided {
		return all
	}
	if c := l.out.Conn; c != nil && c.Flags&bpf.ConnDNAT != 0 {
		dst = l.after.dst.Addr() // of the backend, or, in its answer, of who asked
	}
	if e := l.endpoint(dst, l.out.NATOwner == nil); e != nil {
		add(e)
		return all
	}
	if l.in.Program == "from_netdev" && len(asked) == 0 {
		return all // what is no pod's is the stack's
	}
	if l.in.Program == "from_overlay" {
		add(&agent.ExplainEntry{Map: "lash_endpoints", Key: dst.String(), Value: "no row: nobody on this node has it", Object: l.w.names.end(dst).Object, Decides: true})
		return all
	}
	decides := dropped && l.in.Program != "from_container" || l.out.Action == bpf.ActionTunnel
	add(l.ipcache(dst, decides))
	if (l.in.Program == "from_container" || len(asked) > 0) && l.out.Action != bpf.ActionTunnel {
		if way, err := netdev.FIB(dst, src, l.w.dp.Config().HostIfindex); err == nil {
			e := l.w.routeEntry(dst, way, true)
			add(&e)
			add(l.device(way.Ifindex))
		} else {
			add(&agent.ExplainEntry{Map: "route", Key: dst.String(), Value: netdev.FIBError(err), Decides: true})
		}
	}
	return all
}

const (
	markMask = 0x0f00
	markDone = 0x0300
)

func (l lookup) iface() *agent.ExplainEntry {
	e := &agent.ExplainEntry{Map: "lash_ifaces", Key: device(l.in.Ifindex), Value: "no row: not a pod's device", Decides: true}
	row, err := l.w.dp.IfaceRow(l.in.Ifindex)
	if err != nil || row == nil {
		return e
	}
	if ep, ok := l.w.names.behind(l.in.Ifindex); ok {
		e.Object = l.w.names.endpoint(ep)
	}
	own := row.IP4.Addr()
	if l.before.v6 {
		own = row.IP6.Addr()
	}
	e.Value = l.w.names.identity(row.Identity)
	if e.Decides = own != l.before.src.Addr(); e.Decides {
		has := "has no address of this family"
		if own.IsValid() {
			has = "has " + own.String()
		}
		e.Value = fmt.Sprintf("%s, not %s", has, l.before.src.Addr())
	}
	return e
}

// endpoint is the row of an address of this node; nil: there is none.
func (l lookup) endpoint(a netip.Addr, decides bool) *agent.ExplainEntry {
	row, err := l.w.dp.EndpointRow(a)
	if err != nil || row == nil {
		return nil
	}
	e := &agent.ExplainEntry{Map: "lash_endpoints", Key: a.String(), Object: l.w.names.end(a).Object, Decides: decides, Value: "the node itself"}
	if row.Flags&bpf.EndpointHost == 0 {
		e.Value = fmt.Sprintf("behind %s, %s", device(int(row.Ifindex)), l.w.names.identity(row.Identity))
	}
	return e
}

func (l lookup) ipcache(a netip.Addr, decides bool) *agent.ExplainEntry {
	e := &agent.ExplainEntry{Map: "lash_ipcache", Key: a.String(), Value: "no row: outside of the cluster", Decides: decides}
	p, row, err := l.w.dp.IPCacheRow(a)
	if err != nil || row == nil {
		return e
	}
	e.Key, e.Object, e.Value = p.String(), l.w.names.end(a).Object, l.w.names.identity(row.Identity)
	if n := row.Node.Addr(); n.IsValid() {
		e.Value += ", at " + n.String()
		if node, ok := l.w.names.nodeAt(n); ok {
			e.Value += " (node " + node.Name + ")"
		}
	}
	if row.Flags&bpf.IPCacheTunnel != 0 {
		e.Value += ", by the tunnel"
	}
	if l.in.Tunnel != nil && a == l.in.Tunnel.Sender && row.Flags&bpf.IPCachePeer == 0 {
		e.Value += ", not a node that may encapsulate"
	}
	return e
}

// device is a device towards the network, and what it masquerades with.
func (l lookup) device(ifindex int) *agent.ExplainEntry {
	row, err := l.w.dp.DeviceRow(ifindex)
	if err != nil {
		return nil
	}
	e := &agent.ExplainEntry{Map: "lash_devices", Key: device(ifindex), Value: "the packet keeps its source"}
	switch {
	case row == nil && ifindex == l.w.dp.Config().HostIfindex:
		return nil
	case row == nil:
		e.Value, e.Decides = "no row: not Lash's, left to the stack", true
	case l.out.Conn != nil && l.out.Conn.Flags&bpf.ConnNAT != 0:
		e.Value = "masquerades with " + l.out.Conn.NATAddr.Addr().String()
	}
	return e
}

// conn is the connection's record as it was found.
func (l lookup) conn(decides bool) *agent.ExplainEntry {
	if l.out.Conn == nil && l.out.Known == nil {
		return nil
	}
	e := &agent.ExplainEntry{Map: "lash_conn", Key: fmt.Sprintf("%s > %s", l.before.src, l.before.dst), Value: "no record: a new connection", Decides: decides}
	if c := l.out.Known; c != nil {
		e.Value = l.state(c)
	}
	return e
}

func (l lookup) state(c *bpf.Conn) string {
	state := "new"
	switch left := int32(c.Expires - l.out.Now); {
	case left < 0:
		return "expired"
	case closed(c):
		state = "closed"
	case c.State&bpf.StateReplied != 0:
		state = "established"
	}
	return fmt.Sprintf("%s, expires in %d s", state, int32(c.Expires-l.out.Now)/int32(l.out.Hz))
}

// record is what the connection's record would be after this packet.
func (l lookup) record() *agent.ExplainRecord {
	c := l.out.Conn
	if c == nil {
		return nil
	}
	key, _ := bpf.ConnKeyOf(l.before.src, l.before.dst, l.before.proto)
	if l.out.NATOwner != nil {
		key = *l.out.NATOwner
	}
	from, to := netip.AddrPortFrom(key.Lo.Addr(), key.LoPort.Host()), netip.AddrPortFrom(key.Hi.Addr(), key.HiPort.Host())
	if c.Flags&bpf.ConnInitiatorHi != 0 {
		from, to = to, from
	}
	r := &agent.ExplainRecord{Connection: fmt.Sprintf("%s > %s %s", from, to, l.before.name), State: l.state(c), Forth: l.way(&c.Orig), Back: l.way(&c.Reply)}
	if c.Flags&bpf.ConnDNAT != 0 && c.ToPort != 0 {
		r.Backend = netip.AddrPortFrom(c.ToAddr.Addr(), c.ToPort.Host()).String()
	}
	if c.Flags&bpf.ConnNAT != 0 {
		r.NAT = netip.AddrPortFrom(c.NATAddr.Addr(), c.NATPort.Host()).String()
	}
	return r
}

// way is a direction's decision.
func (l lookup) way(d *bpf.ConnDir) string {
	if d.Epoch == 0 {
		return "undecided"
	}
	var s string
	switch dev := device(int(d.OutIfindex)); d.Action {
	case bpf.ActionPeer:
		s = "into the pod behind " + dev
		if ep, ok := l.w.names.behind(int(d.OutIfindex)); ok {
			s = "into " + l.w.names.endpoint(ep)
		}
	case bpf.ActionEgress:
		s = fmt.Sprintf("out of %s to %s", dev, mac(model.MAC(d.DMAC.B)))
	case bpf.ActionHost, bpf.ActionPass:
		s = "up the stack"
	case bpf.ActionTunnel:
		s = fmt.Sprintf("by the tunnel to %s, VNI %d", d.Node(), d.Vni)
	}
	if d.Flags&bpf.DirToNAT != 0 {
		s += ", translated"
	}
	if d.Flags&bpf.DirNoNAT != 0 {
		s += ", translated back"
	}
	return s + ", from " + l.arrival(d.In)
}

// arrival is where packets of a direction must come in.
func (l lookup) arrival(in uint32) string {
	switch in {
	case bpf.InNetdev:
		return "the network"
	case bpf.InHost:
		return "the host"
	case bpf.InOverlay:
		return "the tunnel"
	}
	if ep, ok := l.w.names.behind(int(in)); ok {
		return strings.TrimPrefix(l.w.names.endpoint(ep), "pod ")
	}
	return device(int(in))
}

func (w *walk) routeEntry(dst netip.Addr, way netdev.Way, decides bool) agent.ExplainEntry {
	e := agent.ExplainEntry{Map: "route", Key: dst.String(), Value: way.String(), Decides: decides}
	if node, ok := w.names.nodeAt(way.Via); ok {
		e.Object = "node " + node.Name
	}
	return e
}
