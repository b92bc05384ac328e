// SPDX-License-Identifier: Apache-2.0

package explain

import (
	"fmt"
	"net/netip"

	"github.com/lash-net/lash/api/agent"
	"github.com/lash-net/lash/internal/model"
)

// translate does what the node's cgroup programs (sock.c) do where a socket names its peer: a service becomes one of its
// backends. The kernel cannot test-run those, so the same rows are read here. done: the packet is never sent.
func (w *walk) translate(p *agent.ExplainPacket, backend int, sockets bool) (done bool, err error) {
	if p.Proto != tcp && p.Proto != udp {
		return false, nil
	}
	front := model.FrontendKey{Addr: p.Dst, L4: model.L4{Proto: number(p.Proto, p.Dst.Is6()), Port: p.Port}}
	id, backends, found, err := w.dp.ServiceRows(front)
	if err != nil || !found {
		return false, err
	}
	if !sockets {
		return false, nil // kube-proxy's, in the stack
	}
	family := "6"
	if p.Dst.Is4() {
		family = "4"
	}
	service := agent.ExplainEntry{Map: "lash_services", Key: front.String(), Value: fmt.Sprintf("number %d, %d backends", id, len(backends)), Object: w.names.end(p.Dst).Object}
	s := w.step(agent.ExplainStep{Program: "connect" + family, Device: "cgroup"})
	w.answer.Backends = len(backends)
	if len(backends) == 0 {
		service.Decides = true
		s.Entries, s.Result = []agent.ExplainEntry{service}, "refused: the service has no backend"
		return true, w.end(agent.ExplainVerdict{Outcome: agent.OutcomeRefused, Reason: "no backend", Text: service.Object + " has no backend: connect() fails",
			Remedy: "no pod that the service selects is ready: 'kubectl get endpointslices' in its namespace"})
	}
	backend = min(backend, len(backends)-1)
	b := backends[backend]
	s.Entries = []agent.ExplainEntry{service, {Map: "lash_backends", Key: fmt.Sprintf("%d, slot %d", id, backend+1), Value: b.String(), Object: w.names.end(b.Addr()).Object, Decides: true}}
	s.Changes = []string{fmt.Sprintf("destination %s -> %s", netip.AddrPortFrom(p.Dst, p.Port), b)}
	s.Result = fmt.Sprintf("one of %d backends, chosen at random; here number %d", len(backends), backend+1)
	p.Dst, p.Port = b.Addr(), b.Port()
	return false, nil
}
