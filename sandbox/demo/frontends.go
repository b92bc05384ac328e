// SPDX-License-Identifier: Apache-2.0

package demo

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"

	"github.com/lash-net/lash/sandbox/plan"
)

// Addresses of services that nobody else has: an external IP, and what a load balancer's controller would assign.
var (
	external = map[string]netip.Addr{"v4": netip.MustParseAddr("198.51.100.80"), "v6": netip.MustParseAddr("2001:db8:80::80")}
	balancer = map[string]netip.Addr{"v4": netip.MustParseAddr("198.51.100.81"), "v6": netip.MustParseAddr("2001:db8:80::81")}
)

const webHostPort = 8090

func outsideAddr(f string) netip.Addr {
	if f == "v6" {
		return plan.Outside6
	}
	return plan.Outside4
}

// otherFrontends are the checks of services that have more than a cluster IP, in one family. network is the mode of routing between nodes.
func (w *world) otherFrontends(f, network string) []check {
	outside := func(ctx context.Context, argv ...string) (string, error) { return w.c.Exec(ctx, plan.Outside, argv...) }
	pod := w.inPod(w.client["n2"])
	isBackend := func(out string, err error) error {
		if err == nil && !slices.ContainsFunc(w.c.Nodes, func(n string) bool { return w.web[n].name == strings.TrimSpace(out) }) {
			err = fmt.Errorf("answer %q", out)
		}
		return err
	}
	nodePort := func(ctx context.Context, service, port string) (netip.AddrPort, error) {
		s, err := w.frontendsOf(ctx, "demo", service)
		return netip.AddrPortFrom(nodeAddr("n1", f), s.nodePorts[port]), err
	}
	// every asks often enough to meet every backend, and returns the different answers.
	every := func(ctx context.Context, run runner, to netip.AddrPort, path string) ([]string, error) {
		out, err := run(ctx, "sh", "-c", fmt.Sprintf("for i in $(seq 40); do curl -sS --fail --max-time 5 -g http://%s%s && echo || exit 1; done | sort -u", to, path))
		return strings.Fields(out), err
	}
	var list []check
	for _, mode := range []string{"snat", "dsr"} {
		list = append(list,
			check{"NodePort from outside, " + mode + ", " + f + ": every backend is used", func(ctx context.Context) error {
				to, err := nodePort(ctx, "web-"+mode, "http")
				if err != nil {
					return err
				}
				got, err := every(ctx, outside, to, "/hostname")
				if err == nil && len(got) != nodes {
					err = fmt.Errorf("answered by %v", got)
				}
				return err
			}},
			check{"NodePort from outside, " + mode + ", " + f + ": " + map[string]string{"snat": "backends on other nodes see the node", "dsr": "every backend sees the client"}[mode], func(ctx context.Context) error {
				to, err := nodePort(ctx, "web-"+mode, "http")
				if err != nil {
					return err
				}
				got, err := every(ctx, outside, to, "/clientip")
				seen := map[netip.Addr]bool{}
				for _, s := range got {
					ap, _ := netip.ParseAddrPort(s)
					seen[ap.Addr().Unmap()] = true
				}
				want := map[netip.Addr]bool{outsideAddr(f): true} // of the backend on the node itself, in both modes
				if mode == "snat" {
					forwarder, ferr := w.forwarder(ctx, "n1", f, network)
					err = errors.Join(err, ferr)
					want[forwarder] = true
				}
				if err == nil && !maps.Equal(seen, want) {
					err = fmt.Errorf("seen as %v, want %v", slices.Collect(maps.Keys(seen)), slices.Collect(maps.Keys(want)))
				}
				return err
			}},
			check{"NodePort from outside, " + mode + ", " + f + ": UDP, answered from the node's address", func(ctx context.Context) error {
				to, err := nodePort(ctx, "web-"+mode, "udp")
				if err != nil {
					return err
				}
				return isBackend(outside(ctx, w.c.Toolbox(), "ask", "udp", to.String(), "hostname"))
			}},
			check{"NodePort from a pod, " + mode + ", " + f, func(ctx context.Context) error {
				to, err := nodePort(ctx, "web-"+mode, "http")
				if err != nil {
					return err
				}
				return isBackend(pod(ctx, curl(to.Addr(), int(to.Port()), "/hostname")...))
			}},
		)
	}
	for _, a := range []struct {
		name string
		addr netip.Addr
	}{{"external IP", external[f]}, {"load balancer's IP", balancer[f]}} {
		list = append(list,
			check{a.name + " from outside, " + f, func(ctx context.Context) error {
				if err := errors.Join(w.assignBalancer(ctx), w.routeOutside(ctx, a.addr, f)); err != nil {
					return err
				}
				return isBackend(outside(ctx, curl(a.addr, 80, "/hostname")...))
			}},
			check{a.name + " from a pod, " + f, func(ctx context.Context) error { return isBackend(pod(ctx, curl(a.addr, 80, "/hostname")...)) }},
		)
	}
	return append(list,
		check{"HostPort from outside, " + f + ": the node's own pod", func(ctx context.Context) error {
			out, err := outside(ctx, curl(nodeAddr("n2", f), webHostPort, "/hostname")...)
			return expect(out, err, w.web["n2"].name)
		}},
		check{"HostPort from a pod of another node, " + f, func(ctx context.Context) error {
			out, err := w.in(ctx, w.client["n1"], curl(nodeAddr("n3", f), webHostPort, "/hostname")...)
			return expect(out, err, w.web["n3"].name)
		}},
		check{"session affinity, " + f + ": a client keeps its backend, a pod at the socket and one outside", func(ctx context.Context) error {
			s, err := w.frontendsOf(ctx, "demo", "web-sticky")
			if err != nil {
				return err
			}
			for _, c := range []struct {
				run runner
				to  netip.AddrPort
			}{{pod, netip.AddrPortFrom(s.ips[f], s.ports["http"])}, {outside, netip.AddrPortFrom(nodeAddr("n1", f), s.nodePorts["http"])}} {
				got, err := every(ctx, c.run, c.to, "/hostname")
				if err == nil && len(got) != 1 {
					err = fmt.Errorf("%s answered by %v", c.to, got)
				}
				if err != nil {
					return err
				}
			}
			return nil
		}},
	)
}

// forwarder is the address under which a node forwards packets for services to other nodes: its own, or, through a tunnel,
// its router's.
func (w *world) forwarder(ctx context.Context, node, f, network string) (netip.Addr, error) {
	if network != "vxlan" {
		return nodeAddr(node, f), nil
	}
	_, routers, _, err := w.ciliumNodes(ctx)
	for _, r := range routers[node] {
		if family(r) == f {
			return r, err
		}
	}
	return netip.Addr{}, errors.Join(err, fmt.Errorf("%s has no router address of family %s", node, f))
}

// assignBalancer writes into the status of web-dsr what a load balancer's controller would.
func (w *world) assignBalancer(ctx context.Context) error {
	type ingress struct {
		IP string `json:"ip"`
	}
	patch, err := json.Marshal(map[string]any{"status": map[string]any{"loadBalancer": map[string]any{"ingress": []ingress{{balancer["v4"].String()}, {balancer["v6"].String()}}}}})
	if err != nil {
		return err
	}
	_, err = w.c.Kubectl(ctx, "-n", "demo", "patch", "service", "web-dsr", "--subresource=status", "--type=merge", "--patch", string(patch))
	return err
}

// routeOutside makes the machine outside send what is for an address to n1.
func (w *world) routeOutside(ctx context.Context, a netip.Addr, f string) error {
	_, err := w.c.Exec(ctx, plan.Outside, "ip", "route", "replace", single(a).String(), "via", nodeAddr("n1", f).String())
	return err
}
