// SPDX-License-Identifier: Apache-2.0

package explain

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"

	"golang.org/x/sys/unix"

	"github.com/lash-net/lash/api/agent"
	"github.com/lash-net/lash/bpf"
	"github.com/lash-net/lash/internal/datapath"
	"github.com/lash-net/lash/internal/datapath/netdev"
	"github.com/lash-net/lash/internal/model"
	"github.com/lash-net/lash/internal/monitor"
	"github.com/lash-net/lash/internal/state"
)

// Explainer answers for one node.
type Explainer struct {
	Tables   *state.Tables
	Datapath func() *datapath.Datapath // nil while there is none yet
	Sockets  func(pods bool) bool      // services are translated at the node's sockets, or at pods'
	Peers    Peers
}

// mostPrograms is how many programs a packet meets on one node at most before it is taken to go in circles.
const mostPrograms = 8

// walk is a packet's way through this node.
type walk struct {
	dp     *datapath.Datapath
	names  names
	node   string
	run    *datapath.DryRun
	fresh  bool
	answer agent.ExplainHopAnswer
	ran    int
}

// Hop tells this node's part of a packet's way. It must be called in the node's network namespace.
func (e *Explainer) Hop(_ context.Context, req agent.ExplainHop) (agent.ExplainHopAnswer, error) {
	dp := e.Datapath()
	if dp == nil {
		return agent.ExplainHopAnswer{}, errors.New("the datapath is not loaded yet: 'lash status' says what the agent waits for")
	}
	run, err := dp.DryRun(req.Fresh)
	if err != nil {
		return agent.ExplainHopAnswer{}, err
	}
	defer run.Close()
	w := &walk{dp: dp, names: namesOf(e.Tables), run: run, fresh: req.Fresh}
	w.node = w.names.local()
	switch {
	case req.From == agent.FromPod && req.Packet != nil:
		err = w.fromPod(*req.Packet, req.Backend, e.Sockets(true))
	case req.From == agent.FromHost && req.Packet != nil:
		err = w.fromHost(*req.Packet, req.Backend, e.Sockets(false))
	case req.From == agent.FromNetwork && (req.Packet != nil || len(req.Frame) > 0):
		err = w.fromNetwork(req)
	case req.From == agent.FromTunnel && len(req.Frame) > 0:
		err = w.fromTunnel(req)
	default:
		err = fmt.Errorf("a hop from %q: must be from pod, host, network or tunnel, with a packet", req.From)
	}
	return w.answer, err
}

func (w *walk) step(s agent.ExplainStep) *agent.ExplainStep {
	s.Node = w.node
	w.answer.Steps = append(w.answer.Steps, s)
	return &w.answer.Steps[len(w.answer.Steps)-1]
}

func (w *walk) end(v agent.ExplainVerdict) error {
	v.Node = w.node
	w.answer.Verdict = &v
	return nil
}

func device(ifindex int) string {
	if dev, err := net.InterfaceByIndex(ifindex); err == nil {
		return dev.Name
	}
	return fmt.Sprintf("(device %d is gone)", ifindex)
}

// opens: the packet is a connection's first.
func (w *walk) opens(p agent.ExplainPacket) (bool, error) {
	k, _ := bpf.ConnKeyOf(netip.AddrPortFrom(p.Src, p.SourcePort), netip.AddrPortFrom(p.Dst, p.Port), number(p.Proto, p.Dst.Is6()))
	c, err := w.dp.ConnRow(k)
	return w.fresh || c == nil || closed(c), err
}

func closed(c *bpf.Conn) bool {
	return c.State&bpf.StateClosed != 0 || c.State&bpf.StateFINBoth == bpf.StateFINBoth
}

func (w *walk) fromPod(p agent.ExplainPacket, backend int, sockets bool) error {
	if done, err := w.translate(&p, backend, agent.FromPod, sockets); done || err != nil {
		return err
	}
	row, err := w.dp.EndpointRow(p.Pod)
	if err != nil {
		return err
	}
	if row == nil || row.Flags&bpf.EndpointHost != 0 {
		return fmt.Errorf("no pod of node %s has address %s: lash_endpoints has no row of it; 'lash endpoint list' shows the pods there are", w.node, p.Pod)
	}
	if !p.Src.IsValid() {
		p.Src = p.Pod
	}
	w.answer.Src = p.Src
	opens, err := w.opens(p)
	if err != nil {
		return err
	}
	frame, err := build(p, row.MAC.B, row.NodeMAC.B, opens)
	if err != nil {
		return err
	}
	if ep, ok := w.names.behind(int(row.Ifindex)); ok && ep.Network.RouteMTU > 0 && len(frame)-ethLen > ep.Network.RouteMTU {
		s := w.step(agent.ExplainStep{Program: "stack", Device: "the pod's own", Packet: monitor.Summary(frame), Result: fmt.Sprintf("too big: the pod's routes have an MTU of %d", ep.Network.RouteMTU)})
		return w.end(agent.ExplainVerdict{Outcome: agent.OutcomeAnswered, Reason: fmt.Sprintf("fragmentation needed, MTU %d", ep.Network.RouteMTU), Text: "does not leave the pod in one piece: " + s.Result})
	}
	return w.program(datapath.DryPacket{Program: "from_container", Ifindex: int(row.Ifindex), Frame: frame})
}

func (w *walk) fromHost(p agent.ExplainPacket, backend int, sockets bool) error {
	if done, err := w.translate(&p, backend, agent.FromHost, sockets); done || err != nil {
		return err
	}
	way, err := netdev.FIB(p.Dst, p.Src, 0)
	s := w.step(agent.ExplainStep{Program: "stack", Result: "a process of the node sends it"})
	if err != nil {
		s.Result = netdev.FIBError(err)
		return w.end(agent.ExplainVerdict{Outcome: agent.OutcomeAnswered, Reason: s.Result, Text: fmt.Sprintf("node %s cannot send to %s: %s", w.node, p.Dst, s.Result)})
	}
	s.Entries = []agent.ExplainEntry{w.routeEntry(p.Dst, way, true)}
	if !p.Src.IsValid() {
		p.Src = way.Src
	}
	w.answer.Src = p.Src
	if way.Local {
		s.Result = "to a process of the same node"
		return w.end(agent.ExplainVerdict{Outcome: agent.OutcomeHost, Text: "reaches node " + w.node + "'s own processes, without leaving it"})
	}
	opens, err := w.opens(p)
	if err != nil {
		return err
	}
	frame, err := build(p, model.MAC{}, model.MAC{}, opens)
	if err != nil {
		return err
	}
	s.Packet, s.Device = monitor.Summary(frame), way.Dev
	return w.out(frame, way)
}

// out is what follows when the stack sends a packet by a device.
func (w *walk) out(frame []byte, way netdev.Way) error {
	cfg := w.dp.Config()
	if way.Ifindex == cfg.HostIfindex {
		setMACs(frame, cfg.HostMAC, cfg.HostMAC)
		return w.program(datapath.DryPacket{Program: "from_host", Ifindex: way.Ifindex, Frame: frame})
	}
	row, err := w.dp.DeviceRow(way.Ifindex)
	if err != nil {
		return err
	}
	if row == nil {
		return w.leave(way.Ifindex, frame)
	}
	setMACs(frame, row.MAC.B, model.MAC{})
	return w.program(datapath.DryPacket{Program: "to_netdev", Ifindex: way.Ifindex, Frame: frame})
}

func (w *walk) fromNetwork(req agent.ExplainHop) error {
	at := w.dp.Config().DirectIfindex
	devices, err := w.dp.Devices().List(context.Background())
	if err != nil {
		return err
	}
	frame := req.Frame
	if req.Packet != nil {
		// It comes in where its answer would go out.
		if way, err := netdev.FIB(req.Packet.Src, netip.Addr{}, 0); err == nil {
			if _, ok := devices[way.Ifindex]; ok {
				at = way.Ifindex
			}
		}
		if frame, err = build(*req.Packet, model.MAC{}, devices[at].MAC, true); err != nil {
			return err
		}
	} else {
		h, err := parse(frame)
		if err != nil {
			return err
		}
		for ifindex, d := range devices {
			if d.MAC == h.dmac {
				at = ifindex
			}
		}
		// What a neighbour table or another router would have written.
		setMACs(frame, h.smac, devices[at].MAC)
	}
	if _, ok := devices[at]; !ok {
		return fmt.Errorf("node %s has no device towards the network that Lash manages: see devices in 'lash status --verbose'", w.node)
	}
	if filtered, err := w.prefilter(at, frame); filtered || err != nil {
		return err
	}
	return w.program(datapath.DryPacket{Program: "from_netdev", Ifindex: at, Frame: frame})
}

// prefilter tells whether the device drops the packet before the kernel sees it. Of all that XDP may do that is the only
// thing which from_netdev would not.
func (w *walk) prefilter(at int, frame []byte) (filtered bool, err error) {
	p, err := parse(frame)
	if err != nil {
		return false, err
	}
	in := datapath.DryPacket{Program: "xdp_entry", Ifindex: at, Frame: frame, Src: p.src, Dst: p.dst, Proto: p.proto}
	out, err := w.run.Run(in)
	switch {
	case errors.Is(err, datapath.ErrNotAttached):
		return false, nil
	case err != nil:
		return false, err
	case out.Verdict != datapath.VerdictDrop:
		return false, nil
	}
	return true, w.program(in)
}

func (w *walk) fromTunnel(req agent.ExplainHop) error {
	at := w.dp.Config().OverlayIfindex
	if at == 0 {
		w.step(agent.ExplainStep{Program: "stack", Result: "no tunnel device"})
		return w.end(agent.ExplainVerdict{Outcome: agent.OutcomeDropped, Reason: "no tunnel device", Text: "node " + w.node + " has no tunnel device: nobody takes the encapsulated packet",
			Remedy: "the nodes are in different routing modes: see 'lash status' on both"})
	}
	return w.program(datapath.DryPacket{Program: "from_overlay", Ifindex: at, Frame: req.Frame, Tunnel: &datapath.TunnelKey{Sender: req.Sender, VNI: req.VNI}})
}

// program runs one and follows what it decides.
func (w *walk) program(in datapath.DryPacket) error {
	if w.ran++; w.ran > mostPrograms {
		return fmt.Errorf("the packet goes in circles on node %s", w.node)
	}
	before, err := parse(in.Frame)
	if err != nil {
		return err
	}
	in.Src, in.Dst, in.Proto = before.src, before.dst, before.proto
	out, err := w.run.Run(in)
	if errors.Is(err, datapath.ErrNotAttached) {
		return fmt.Errorf("node %s: %w: packets pass there without Lash. The agent attaches it when it starts: see its log", w.node, err)
	}
	if err != nil {
		return err
	}
	after, err := parse(out.Frame)
	if err != nil {
		return fmt.Errorf("what %s made of the packet: %w", in.Program, err)
	}
	s := w.step(agent.ExplainStep{Program: in.Program, Device: device(in.Ifindex), Tag: out.Program.Tag, Packet: monitor.Summary(in.Frame), Changes: changes(before, after)})
	drop := observe(s, out)
	look := lookup{w, in, out, before, after, 0}
	if drop != nil {
		look.drop = drop.Head.Subtype
	}
	s.Entries, s.Record = look.entries(), look.record()
	return w.follow(s, in, out, drop)
}

// follow goes where the program sends the packet.
func (w *walk) follow(s *agent.ExplainStep, in datapath.DryPacket, out *datapath.DryOutcome, drop *monitor.Drop) error {
	switch {
	case out.Verdict == datapath.VerdictDrop && drop != nil:
		file := bpf.FileName(drop.File)
		s.Result = fmt.Sprintf("dropped: %s (%s:%d)", drop.Reason(), file, drop.Line)
		return w.end(agent.ExplainVerdict{Outcome: agent.OutcomeDropped, Reason: drop.Reason(), File: file, Line: drop.Line,
			Text: fmt.Sprintf("dropped on node %s by %s: %s (%s:%d)", w.node, in.Program, drop.Reason(), file, drop.Line), Remedy: remedies[drop.Head.Subtype]})
	case out.Verdict == datapath.VerdictDrop:
		s.Result = "taken off the wire without counting a drop"
		return w.end(agent.ExplainVerdict{Outcome: agent.OutcomeDropped, Reason: "nobody hears it", Text: "node " + w.node + " takes it off the wire: it is for nobody here"})
	case refused(out) && in.Proto == model.ProtoTCP || refused(out) && in.Proto == model.ProtoUDP || refused(out) && in.Proto == model.ProtoSCTP:
		s.Result = "refused: to a port of the node's router address where nobody listens"
		return w.end(agent.ExplainVerdict{Outcome: agent.OutcomeRefused, Reason: "no backend", Packet: monitor.Summary(out.Frame),
			Text: fmt.Sprintf("refused by node %s: its IP stack answers in the service's name that nobody listens", w.node), Remedy: "a port that the service does not have, or a service without ready backends: 'lash service list', 'kubectl get endpointslices'"})
	case out.Verdict == datapath.VerdictRedirect:
		return w.redirect(s, in, out)
	case in.Program == "to_netdev":
		s.Result = "leaves by " + s.Device
		return w.leave(in.Ifindex, out.Frame)
	}
	s.Result = "to the node's IP stack"
	return w.stack(in.Ifindex, out.Frame)
}

func (w *walk) redirect(s *agent.ExplainStep, in datapath.DryPacket, out *datapath.DryOutcome) error {
	switch dev := device(out.Ifindex); out.Action {
	case bpf.ActionPeer:
		ep, known := w.names.behind(out.Ifindex)
		v := agent.ExplainVerdict{Outcome: agent.OutcomeDelivered, Device: dev, Packet: monitor.Summary(out.Frame)}
		object := "the pod behind " + dev
		if known {
			object = w.names.endpoint(ep)
			if ep.Pod != "" {
				v.Pod = ep.PodName()
			}
		}
		s.Result = "into " + object + ", behind " + dev
		v.Text = fmt.Sprintf("delivered to %s on node %s", object, w.node)
		return w.end(v)
	case bpf.ActionEgress, bpf.ActionNeigh:
		s.Result = "out of " + dev
		if out.Action == bpf.ActionNeigh {
			s.Result += ", by the kernel's neighbour table: the next hop's MAC address is not known, or due to be checked"
		}
		if row, err := w.dp.DeviceRow(out.Ifindex); err != nil || row == nil {
			return errors.Join(err, w.leave(out.Ifindex, out.Frame))
		}
		return w.program(datapath.DryPacket{Program: "to_netdev", Ifindex: out.Ifindex, Frame: out.Frame, Mark: out.Mark})
	case bpf.ActionHost:
		s.Result = "to the node's IP stack, by way of " + dev
		return w.stack(out.Ifindex, out.Frame)
	case bpf.ActionTunnel:
		return w.tunnel(s, out)
	}
	return fmt.Errorf("%s on node %s redirects in a way that is not known (%d)", in.Program, w.node, out.Action)
}

// tunnel follows an encapsulated packet to the node it is for.
func (w *walk) tunnel(s *agent.ExplainStep, out *datapath.DryOutcome) error {
	d := direction(out)
	if d == nil || d.Action != bpf.ActionTunnel {
		return errors.New("a packet into the tunnel without a record of where it leads")
	}
	to := d.Node()
	way, err := netdev.FIB(to, netip.Addr{}, 0)
	if err != nil {
		s.Result = fmt.Sprintf("into the tunnel to %s, but there: %s", to, netdev.FIBError(err))
		return w.end(agent.ExplainVerdict{Outcome: agent.OutcomeDropped, Reason: netdev.FIBError(err), Text: fmt.Sprintf("node %s cannot encapsulate to %s: %s", w.node, to, netdev.FIBError(err)),
			Remedy: "nodes must reach each other's addresses: 'ip route get " + to.String() + "' on the node"})
	}
	node, known := w.names.nodeAt(to)
	name := to.String()
	if known {
		name = "node " + node.Name + " (" + name + ")"
	}
	s.Result = fmt.Sprintf("encapsulated to %s with VNI %d, from %s, %s", name, d.Vni, way.Src, way)
	if !known {
		return w.end(agent.ExplainVerdict{Outcome: agent.OutcomeSent, Device: way.Dev, Text: fmt.Sprintf("leaves node %s in the tunnel to %s, which is no node of the cluster", w.node, to)})
	}
	w.answer.NextNode = node.Name
	w.answer.Next = &agent.ExplainHop{From: agent.FromTunnel, Frame: out.Frame, Sender: way.Src, VNI: d.Vni, Fresh: w.fresh}
	return nil
}

// direction is the packet's own half of its connection's record.
func direction(out *datapath.DryOutcome) *bpf.ConnDir {
	switch {
	case out.Conn == nil:
		return nil
	case out.Orig:
		return &out.Conn.Orig
	}
	return &out.Conn.Reply
}

// stack is what the node's IP stack does with a packet that comes in by a device. Netfilter is not asked.
func (w *walk) stack(iif int, frame []byte) error {
	h, err := parse(frame)
	if err != nil {
		return err
	}
	s := w.step(agent.ExplainStep{Program: "stack", Device: device(iif), Packet: monitor.Summary(frame)})
	way, err := netdev.FIB(h.dst.Addr(), h.src.Addr(), iif)
	if err != nil {
		s.Result = netdev.FIBError(err)
		v := agent.ExplainVerdict{Outcome: agent.OutcomeAnswered, Reason: s.Result, Text: fmt.Sprintf("the IP stack of node %s answers: %s", w.node, s.Result), Remedy: "'ip route' on the node; the routes Lash makes are in 'lash db show routes'"}
		if errors.Is(err, unix.EXDEV) || errors.Is(err, unix.EINVAL) {
			v.Outcome, v.Text = agent.OutcomeDropped, fmt.Sprintf("the IP stack of node %s drops it: %s", w.node, s.Result)
		}
		return w.end(v)
	}
	s.Entries = []agent.ExplainEntry{w.routeEntry(h.dst.Addr(), way, true)}
	answered := func(reason, remedy string) error {
		s.Result = "answered: " + reason
		return w.end(agent.ExplainVerdict{Outcome: agent.OutcomeAnswered, Reason: reason, Text: fmt.Sprintf("the IP stack of node %s answers the sender: %s", w.node, reason), Remedy: remedy})
	}
	switch {
	case way.Local:
		s.Result = "to the node's own processes"
		return w.end(agent.ExplainVerdict{Outcome: agent.OutcomeHost, Packet: monitor.Summary(frame), Text: "reaches node " + w.node + "'s own processes"})
	case h.ttl <= 1:
		return answered("time exceeded", "")
	case len(frame)-ethLen > way.MTU && way.MTU > 0:
		return answered(fmt.Sprintf("fragmentation needed, MTU %d", way.MTU), "the sender must take notice of it (path MTU discovery): ICMP must not be filtered on the way")
	}
	s.Result = "forwarded out of " + way.Dev
	return w.out(forwarded(frame), way)
}

// leave is a packet on the wire: it goes on at the node that it is for, or is gone.
func (w *walk) leave(ifindex int, frame []byte) error {
	h, err := parse(frame)
	if err != nil {
		return err
	}
	dst, dev := h.dst.Addr(), device(ifindex)
	hop, next := dst, ""
	if way, err := netdev.FIB(dst, netip.Addr{}, 0); err == nil && way.Via.IsValid() {
		hop, next = way.Via, " via "+way.Via.String()
	}
	known := true
	if h.dmac == (model.MAC{}) { // left to the neighbour table
		if h.dmac, known, err = netdev.Neighbour(ifindex, hop); err != nil {
			return err
		}
	}
	if known {
		next += " (" + mac(h.dmac) + ")"
	}
	node, ours := w.names.nodeAt(dst)
	if !ours {
		node, ours = w.names.nodeOf(dst)
	}
	if ours && !node.Local {
		if !known {
			w.step(agent.ExplainStep{Program: "stack", Device: dev, Result: fmt.Sprintf("asks for the MAC address of %s, and sends the packet when it is answered", hop)})
		}
		w.answer.NextNode = node.Name
		w.answer.Next = &agent.ExplainHop{From: agent.FromNetwork, Frame: frame, Fresh: w.fresh}
		return nil
	}
	v := agent.ExplainVerdict{Outcome: agent.OutcomeSent, Device: dev, NextHop: hop, Packet: monitor.Summary(frame), Text: fmt.Sprintf("leaves node %s by %s%s, towards what is no part of the cluster", w.node, dev, next)}
	if !known {
		v.Reason = agent.ReasonNeighbour
		v.Text = fmt.Sprintf("leaves node %s by %s%s if %s answers: its MAC address is not known, the kernel asks for it while the packet waits", w.node, dev, next, hop)
	}
	return w.end(v)
}

// remedies are what to do about a drop, by its reason.
var remedies = map[uint8]string{
	bpf.DropInvalidSource:   "a pod sends from the addresses it was given only: look for addresses added in the pod, or for a packet that comes back into the network it left",
	bpf.DropNoService:       "the service has no backend here that is ready: 'kubectl get endpointslices -o wide'; with externalTrafficPolicy Local only nodes with one serve it",
	bpf.DropSourceRange:     "the service's loadBalancerSourceRanges say whom it serves, or, with annotation src-ranges-policy: deny, whom not",
	bpf.DropClusterIP:       "cluster IPs are served to the cluster only; use a NodePort or LoadBalancer, or set bpf.lbExternalClusterIP=true",
	bpf.DropUnroutable:      "nobody has the address any more, or not yet: 'kubectl get pods -A -o wide' shows who should have it; the sender may hold an old address",
	bpf.DropCTInsert:        "lash_conn is full: 'lash bpf ct list' shows by what; raise bpf-ct-global-max in the configuration",
	bpf.DropNATExhausted:    "all source ports towards this destination are in use: 'lash bpf nat list' shows by whom",
	bpf.DropNATProto:        "a packet of this kind cannot be masqueraded; give its destination to the native routing CIDR if it knows pods' addresses",
	bpf.DropUnknownSender:   "encapsulated packets are taken from nodes only, by their InternalIP: compare 'lash node list' with the outer source address",
	bpf.DropInvalidIdentity: "the sender's pod has no identity yet, or the sender is no node of this cluster: 'lash endpoint list' there",
	bpf.DropTunnelKey:       "something else than the tunnel's device sends into it",
	bpf.DropNoEndpoint:      "the pod's device is not known: the agent was not there when the pod was made, or is about to remove it; 'lash endpoint list'",
	bpf.DropNoFragment:      "fragments came without or before their first; a smaller MTU or path MTU discovery avoids them",
	bpf.DropFIB:             "the kernel could not look up a route: its log (dmesg) may say why",
	bpf.DropTupleTaken:      "the client has a connection from the same port to this backend by way of another frontend, and the backend could not tell them apart: the client's third SYN is answered, by SNAT; 'lash bpf ct list' shows the other one",
	bpf.DropVLAN:            "pods send untagged frames",
	bpf.DropDenylist:        "the source is in the node's prefilter: 'lash prefilter list' shows it, 'lash prefilter delete' takes it out",
}
