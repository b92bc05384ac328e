// SPDX-License-Identifier: Apache-2.0

package netns

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/lash-net/lash/bpf"
)

// Frontends of the tests: an address that routers lead to node 1, and a port on every node.
const (
	vip4, vip6 = "198.18.0.1", "fd98::1"
	servedPort = 7000 // of serve
)

func vipOf(v6 bool) netip.Addr {
	if v6 {
		return addr(vip6)
	}
	return addr(vip4)
}

// balance makes a service with these backends of one family on every node: those of the node itself first.
func (c *cluster) balance(t *testing.T, flags uint32, backends ...netip.Addr) {
	t.Helper()
	v6 := len(backends) > 0 && backends[0].Is6()
	for _, fam := range []bool{false, true} {
		if len(backends) > 0 && fam != v6 {
			continue
		}
		for _, nd := range c.nodes {
			nd.do(t, "service", func() error { return nd.balance(flags, fam, backends) })
		}
	}
}

func (nd *node) balance(flags uint32, v6 bool, backends []netip.Addr) error {
	unspecified, id := netip.IPv4Unspecified(), uint32(1)
	if v6 {
		unspecified, id = netip.IPv6Unspecified(), 2
	}
	var local, all []netip.Addr
	for _, b := range backends {
		if nd.cidr4().Contains(b) || nd.cidr6().Contains(b) || b == nd.ip4 || b == nd.ip6 {
			local = append(local, b)
		} else {
			all = append(all, b)
		}
	}
	all = append(local, all...)
	row := bpf.Service{ID: id, Count: uint32(len(all)), First: 1, Local: uint32(len(local)), Flags: flags}
	put := func(name string, k, v any) error {
		if err := nd.dp.Map(name).Put(k, v); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		return nil
	}
	errs := []error{
		put("lash_ports", uint32(0), uint8(bpf.PortBackend)), put("lash_ports", uint32(servedPort), uint8(bpf.PortBackend)),
		put("lash_ports", uint32(nodePort), uint8(bpf.PortFrontend)), put("lash_ports", uint32(vipPort), uint8(bpf.PortFrontend)),
		put("lash_services", bpf.ServiceKey{Addr: bpf.AddrFrom(vipOf(v6))}, bpf.Service{Flags: bpf.FrontendAddress | bpf.FrontendOutside}),
	}
	for _, a := range []netip.Addr{nd.ip4, nd.ip6} {
		errs = append(errs, put("lash_endpoints", bpf.AddrFrom(a), bpf.Endpoint{Identity: bpf.IdentityHost, Flags: bpf.EndpointHost | bpf.EndpointNodePort}))
	}
	for i, b := range all {
		errs = append(errs, put("lash_backends", bpf.BackendKey{Service: id, Slot: uint32(i + 1)}, bpf.Backend{Addr: bpf.AddrFrom(b), Port: bpf.ToBE16(servedPort)}),
			put("lash_members", bpf.MemberKey{Service: id, Addr: bpf.AddrFrom(b), Port: bpf.ToBE16(servedPort)}, uint32(bpf.MemberActive)))
	}
	for _, proto := range []uint8{unix.IPPROTO_TCP, unix.IPPROTO_UDP} {
		errs = append(errs, put("lash_services", bpf.ServiceKey{Addr: bpf.AddrFrom(vipOf(v6)), Port: bpf.ToBE16(vipPort), Proto: proto}, row),
			put("lash_services", bpf.ServiceKey{Addr: bpf.AddrFrom(unspecified), Port: bpf.ToBE16(nodePort), Proto: proto}, row))
	}
	return errors.Join(errs...)
}

func TestServicesBPFHostRouting(t *testing.T) { testServices(t, options{podsPerNode: 2}) }
func TestServicesLegacyHostRouting(t *testing.T) {
	testServices(t, options{podsPerNode: 2, legacy: true})
}
func TestServicesVXLAN(t *testing.T) { testServices(t, options{podsPerNode: 2, tunnel: "vxlan"}) }
func TestServicesVXLANLegacyHostRouting(t *testing.T) {
	testServices(t, options{podsPerNode: 2, tunnel: "vxlan", legacy: true})
}
func TestServicesDSR(t *testing.T) { testServices(t, options{podsPerNode: 2, dsr: true}) }
func TestServicesDSRVXLAN(t *testing.T) {
	testServices(t, options{podsPerNode: 2, tunnel: "vxlan", dsr: true})
}

func TestServicesDSRByGeneve(t *testing.T) {
	testServices(t, options{podsPerNode: 2, dsr: true, dsrGeneve: true})
}
func TestServicesDSRByGeneveLegacyHostRouting(t *testing.T) {
	testServices(t, options{podsPerNode: 2, dsr: true, dsrGeneve: true, legacy: true})
}
func TestServicesDSRByGeneveXDP(t *testing.T) {
	testServices(t, options{podsPerNode: 2, dsr: true, dsrGeneve: true, xdp: true})
}
func TestServicesDSRByGeneveVXLAN(t *testing.T) {
	testServices(t, options{podsPerNode: 2, tunnel: "vxlan", dsr: true, dsrGeneve: true})
}

func TestServicesDSRInGeneveTunnel(t *testing.T) {
	needGeneve(t)
	testServices(t, options{podsPerNode: 2, tunnel: "geneve", dsr: true, dsrGeneve: true})
}

// testServices reaches services per packet: from outside, and from pods whose sockets no program translates.
func testServices(t *testing.T, o options) {
	c := newCluster(t, o)
	n1, n2 := c.nodes[0], c.nodes[1]
	ip(t, c.outside, "route add "+vip4+" via "+n1.ip4.String(), "route add "+vip6+" via "+n1.ip6.String())
	a, b, far := n1.pods[0], n1.pods[1], n2.pods[0]
	for _, v6 := range []bool{false, true} {
		of := func(ip4, ip6 netip.Addr) netip.Addr {
			if v6 {
				return ip6
			}
			return ip4
		}
		client := of(addr(outside4), addr(outside6))
		node := of(n1.ip4, n1.ip6)
		fwd, fwdNode, pod := node, node, of(a.ip4, a.ip6) // who forwards to another node's pod and to that node, and who a pod is to a node
		if o.tunnel != "" {
			fwd, pod = of(n1.router4(), n1.router6()), node
		}
		flags := uint32(bpf.FrontendOutside)
		if o.dsr {
			flags, fwd, fwdNode = flags|bpf.FrontendDSR, client, client
		}
		backends := []struct {
			name           string
			addr           netip.Addr
			ns             *os.File
			fromOut, fromA netip.Addr // the client as the backend sees it
		}{
			{"a pod of the node", of(b.ip4, b.ip6), b.ns, client, of(a.ip4, a.ip6)},
			{"a pod of another node", of(far.ip4, far.ip6), far.ns, fwd, of(a.ip4, a.ip6)},
			{"the node itself", node, n1.ns, client, of(a.ip4, a.ip6)},
			{"another node", of(n2.ip4, n2.ip6), n2.ns, fwdNode, pod},
			{"the client itself", of(a.ip4, a.ip6), a.ns, client, of(n1.router4(), n1.router6())},
		}
		for _, be := range backends {
			serve(t, be.ns, be.addr)
			for _, way := range []struct {
				name     string
				from     *os.File
				frontend netip.AddrPort
				seen     netip.Addr
			}{
				{"NodePort from outside", c.outside, netip.AddrPortFrom(node, nodePort), be.fromOut},
				{"VIP from outside", c.outside, netip.AddrPortFrom(vipOf(v6), vipPort), be.fromOut},
				{"VIP from a pod", a.ns, netip.AddrPortFrom(vipOf(v6), vipPort), be.fromA},
				{"NodePort from a pod", a.ns, netip.AddrPortFrom(node, nodePort), be.fromA},
			} {
				t.Run(fmt.Sprintf("%s to %s, IPv%d", way.name, be.name, map[bool]int{false: 4, true: 6}[v6]), func(t *testing.T) {
					c.balance(t, flags, be.addr)
					seen, err := exchange(way.from, way.frontend, 1<<20)
					if err != nil {
						t.Errorf("exchange: %v", err)
					} else if ap, err := netip.ParseAddrPort(seen); err != nil || ap.Addr().Unmap() != way.seen {
						t.Errorf("server saw %s, want %s", seen, way.seen)
					}
					if t.Failed() {
						n1.dump(t)
						n2.dump(t)
					}
				})
			}
		}
		for _, way := range []struct {
			name     string
			from     *os.File
			frontend netip.AddrPort
		}{
			{"NodePort without backends from outside", c.outside, netip.AddrPortFrom(node, nodePort)},
			{"VIP without backends from outside", c.outside, netip.AddrPortFrom(vipOf(v6), vipPort)},
			{"VIP without backends from a pod", a.ns, netip.AddrPortFrom(vipOf(v6), vipPort)},
			{"port that nobody serves from outside", c.outside, netip.AddrPortFrom(vipOf(v6), 81)},
			{"port that nobody serves from a pod", a.ns, netip.AddrPortFrom(vipOf(v6), 81)},
		} {
			t.Run(fmt.Sprintf("%s, IPv%d", way.name, map[bool]int{false: 4, true: 6}[v6]), func(t *testing.T) {
				c.balance(t, flags)
				if err := refused(way.from, way.frontend); err != nil {
					t.Error(err)
					n1.dump(t)
				}
			})
		}
		for name, from := range map[string]*os.File{"outside": c.outside, "a pod": a.ns} {
			t.Run(fmt.Sprintf("ping of a VIP from %s, IPv%d", name, map[bool]int{false: 4, true: 6}[v6]), func(t *testing.T) {
				if out, err := try(from, "ping", "-n", "-c", "2", "-i", "0.2", "-W", "2", vipOf(v6).String()); err != nil {
					t.Errorf("%v\n%s", err, out)
				}
			})
		}
	}
}

// refused wants a refusal at once, by TCP and by UDP.
func refused(from *os.File, at netip.AddrPort) error {
	return inNS(from, func() error {
		d := net.Dialer{Timeout: 3 * time.Second}
		if c, err := d.Dial("tcp", at.String()); err == nil {
			c.Close()
			return errors.New("tcp: connected")
		} else if !errors.Is(err, unix.ECONNREFUSED) {
			return fmt.Errorf("tcp: %w, want connection refused", err)
		}
		u, err := d.Dial("udp", at.String())
		if err != nil {
			return err
		}
		defer u.Close()
		// The stack tells a host only so often: another datagram may be needed.
		for deadline := time.Now().Add(5 * time.Second); time.Now().Before(deadline); {
			if _, err = u.Write([]byte("x")); err == nil {
				u.SetReadDeadline(time.Now().Add(500 * time.Millisecond))
				_, err = u.Read(make([]byte, 1))
			}
			if errors.Is(err, unix.ECONNREFUSED) {
				return nil
			}
		}
		return fmt.Errorf("udp: %w, want connection refused", err)
	})
}

// A sweep leaves the records and translations of services' connections alone while their backend is there, though nobody
// has the frontend's address, and takes both away when it is gone.
func TestSweepKnowsServices(t *testing.T) {
	c := newCluster(t, options{podsPerNode: 2})
	n := c.nodes[0]
	a, b := n.pods[0], n.pods[1]
	serve(t, b.ns, b.ip4)
	c.balance(t, bpf.FrontendOutside, b.ip4)
	if _, err := exchange(a.ns, netip.AddrPortFrom(vipOf(false), vipPort), 1000); err != nil {
		t.Fatal(err)
	}
	n.do(t, "sweep", func() error {
		s, err := n.dp.Sweep(t.Context())
		if err != nil {
			return err
		}
		if s.Connections == 0 || s.Orphaned+s.Translations != 0 {
			return fmt.Errorf("while the backend is there: %+v", s)
		}
		if err := n.dp.Endpoints().Delete(t.Context(), b.ip4); err != nil {
			return err
		}
		if s, err = n.dp.Sweep(t.Context()); err == nil && (s.Orphaned == 0 || s.Translations == 0) {
			err = fmt.Errorf("of the departed backend remains: %+v", s)
		}
		return err
	})
}
