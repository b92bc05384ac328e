// SPDX-License-Identifier: Apache-2.0

package explain

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/lash-net/lash/api/agent"
	"github.com/lash-net/lash/bpf"
	"github.com/lash-net/lash/internal/datapath"
	"github.com/lash-net/lash/internal/model"
	"github.com/lash-net/lash/internal/state"
)

// translate does what the node's cgroup programs (sock.c) do where a socket names its peer: a service becomes one of its
// backends. The kernel cannot test-run those, so the same rows are read here. done: the packet is never sent.
func (w *walk) translate(p *agent.ExplainPacket, backend int, from string, sockets bool) (done bool, err error) {
	if p.Proto != tcp && p.Proto != udp || !sockets || from == agent.FromPod && p.Dst.IsLoopback() {
		return false, nil // the stack's, or packet by packet
	}
	asked := model.FrontendKey{Addr: p.Dst, L4: model.L4{Proto: number(p.Proto, p.Dst.Is6()), Port: p.Port}}
	front, err := w.dp.SocketFrontend(asked)
	if err != nil || front == nil || front.Address() {
		return false, err
	}
	family := "6"
	if p.Dst.Is4() {
		family = "4"
	}
	entry := w.frontend(front)
	w.answer.Backends = len(front.Backends)
	if len(front.Backends) == 0 {
		if !w.dp.Config().DropNoBackend {
			s := w.step(agent.ExplainStep{Program: "connect" + family, Device: "cgroup"})
			entry.Decides = true
			s.Entries, s.Result = []agent.ExplainEntry{entry}, "refused: the service has no backend"
			return true, w.end(agent.ExplainVerdict{Outcome: agent.OutcomeRefused, Reason: "no backend", Text: fmt.Sprintf("%s has no backend %s: connect() fails", entry.Object, front.Scope), Remedy: noBackend(front)})
		}
		return false, nil // its packets are dropped
	}
	s := w.step(agent.ExplainStep{Program: "connect" + family, Device: "cgroup"})
	backend = min(backend, len(front.Backends)-1)
	b := front.Backends[backend]
	s.Entries = []agent.ExplainEntry{entry, w.backend(front.ID, fmt.Sprintf("slot %d", front.Slot+uint32(backend)), b)}
	s.Changes = []string{fmt.Sprintf("destination %s -> %s", netip.AddrPortFrom(p.Dst, p.Port), b)}
	s.Result = fmt.Sprintf("one of %d backends, chosen at random; here number %d", len(front.Backends), backend+1)
	if front.Affinity > 0 {
		s.Result = fmt.Sprintf("one of %d backends: the one that the pod or node had in the last %s, else at random; here number %d", len(front.Backends), time.Duration(front.Affinity)*time.Second, backend+1)
	}
	p.Dst, p.Port = b.Addr(), b.Port()
	return false, nil
}

func noBackend(front *datapath.FrontendRow) string {
	if front.Scope == datapath.ScopeLocal && front.Count > 0 {
		return "its traffic policy is Local and no ready backend is on this node: 'kubectl get endpointslices -o wide' in its namespace"
	}
	return "no pod that the service selects is ready: 'kubectl get endpointslices' in its namespace"
}

// servicePort is "service default/web, port http", by the number of it.
func (n names) servicePort(id uint32) string {
	r, _, ok := n.t.ServicePorts.Get(n.txn, state.ServicePortByID(id))
	if !ok {
		return ""
	}
	kind := "service "
	for _, f := range r.Frontends {
		if f.Type == model.TypeHostPort {
			kind = "host port of pod "
		}
	}
	s := kind + r.Namespace + "/" + r.Name
	if r.Port != "" {
		s += ", port " + r.Port
	}
	return s
}

// frontend is a row of lash_services.
func (w *walk) frontend(front *datapath.FrontendRow) agent.ExplainEntry {
	e := agent.ExplainEntry{Map: "lash_services", Key: front.Key.String(), Object: w.names.servicePort(front.ID)}
	if front.Address() {
		e.Key, e.Value, e.Object = front.Key.Addr.String(), "a service's address; no service has this port", w.names.end(front.Key.Addr).Object
		return e
	}
	if e.Object == "" {
		e.Object = w.names.end(front.Key.Addr).Object
	}
	says := []string{fmt.Sprintf("number %d", front.ID), fmt.Sprintf("%d backends %s", len(front.Backends), front.Scope)}
	for _, f := range []struct {
		flag uint32
		text string
	}{{bpf.FrontendMaglev, "Maglev for packets from outside"}, {bpf.FrontendDSR, "backends answer by themselves (DSR)"}, {bpf.FrontendRanges, "for some sources only"}, {bpf.FrontendDeny, "for all others, that is"}} {
		if front.Flags&f.flag != 0 {
			says = append(says, f.text)
		}
	}
	if front.Affinity > 0 {
		says = append(says, fmt.Sprintf("affinity for %s", time.Duration(front.Affinity)*time.Second))
	}
	e.Value = strings.Join(says, ", ")
	return e
}

func (w *walk) backend(service uint32, which string, to netip.AddrPort) agent.ExplainEntry {
	return agent.ExplainEntry{Map: "lash_backends", Key: fmt.Sprintf("%d, %s", service, which), Value: to.String(), Object: w.names.end(to.Addr()).Object, Decides: true}
}

// services are the rows that a packet met which asks for a frontend, translated or not; decided: nothing else did.
func (l lookup) services(drop uint8) (rows []agent.ExplainEntry, decided bool) {
	outside := l.in.Program == "from_netdev" || l.in.Program == "from_host" && !l.fromNode()
	refused := drop == bpf.DropNoService || drop == bpf.DropSourceRange || drop == bpf.DropClusterIP
	c := l.out.Conn
	translated := c != nil && c.Flags&bpf.ConnDNAT != 0 && l.out.Orig
	if !refused && !translated || !slices.Contains([]string{"from_netdev", "from_container", "from_host"}, l.in.Program) {
		return nil, false
	}
	asked := model.FrontendKey{Addr: l.before.dst.Addr(), L4: model.L4{Proto: l.before.proto, Port: l.before.dst.Port()}}
	front, err := l.w.dp.PacketFrontend(asked, outside)
	if err != nil || front == nil {
		return nil, false // it is gone by now, and its connection lives on
	}
	e := l.w.frontend(front)
	switch {
	case drop == bpf.DropSourceRange:
		said := "no row: not among the service's loadBalancerSourceRanges"
		if front.Flags&bpf.FrontendDeny != 0 {
			said = "among the service's loadBalancerSourceRanges, which keep out"
		}
		return append(rows, e, agent.ExplainEntry{Map: "lash_source_ranges", Key: fmt.Sprintf("%d, %s", front.ID, l.before.src.Addr()), Value: said, Decides: true}), true
	case refused, c.ToPort == 0:
		e.Decides = true
		return append(rows, e), true
	}
	return append(rows, e, l.w.backend(front.ID, "the connection's", netip.AddrPortFrom(c.ToAddr.Addr(), c.ToPort.Host()))), false
}

// fromNode: the packet comes from an address of the node.
func (l lookup) fromNode() bool {
	row, err := l.w.dp.EndpointRow(l.before.src.Addr())
	return err == nil && row != nil && row.Flags&bpf.EndpointHost != 0
}

// refused: the packet asked for a service that nobody serves, and goes to where nobody listens.
func refused(out *datapath.DryOutcome) bool {
	return out.Conn != nil && out.Orig && out.Conn.Flags&bpf.ConnDNAT != 0 && out.Conn.ToPort == 0
}
