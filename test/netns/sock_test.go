// SPDX-License-Identifier: Apache-2.0

package netns

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"syscall"
	"testing"
	"time"

	"github.com/cilium/ebpf"

	"github.com/lash-net/lash/bpf"
	"github.com/lash-net/lash/internal/model"
)

// announce answers on TCP and UDP with a name and the client's address.
func announce(t *testing.T, ns *os.File, at netip.AddrPort, name string) {
	t.Helper()
	err := inNS(ns, func() error {
		l, err := net.Listen("tcp", at.String())
		if err != nil {
			return err
		}
		u, err := net.ListenPacket("udp", at.String())
		if err != nil {
			l.Close()
			return err
		}
		t.Cleanup(func() { l.Close(); u.Close() })
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				fmt.Fprintf(c, "%s %s", name, c.RemoteAddr())
				c.Close()
			}
		}()
		go func() {
			buf := make([]byte, 2048)
			for {
				_, from, err := u.ReadFrom(buf)
				if err != nil {
					return
				}
				u.WriteTo(fmt.Appendf(nil, "%s %s", name, from), from)
			}
		}()
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

// backendsOf writes a service port's slots from 1 on and its members, all of them active.
func (nd *node) backendsOf(t *testing.T, id uint32, backends ...netip.AddrPort) {
	t.Helper()
	for i, b := range backends {
		nd.put(t, "lash_backends", &bpf.BackendKey{Service: id, Slot: uint32(i) + 1}, &bpf.Backend{Addr: bpf.AddrFrom(b.Addr()), Port: bpf.ToBE16(b.Port())})
		nd.member(t, id, b, bpf.MemberActive)
	}
}

func (nd *node) member(t *testing.T, id uint32, b netip.AddrPort, state uint32) {
	t.Helper()
	nd.put(t, "lash_members", memberKey(id, b), &state)
}

func memberKey(id uint32, b netip.AddrPort) *bpf.MemberKey {
	return &bpf.MemberKey{Service: id, Addr: bpf.AddrFrom(b.Addr()), Port: bpf.ToBE16(b.Port())}
}

// front writes a frontend's row for TCP and UDP.
func (nd *node) front(t *testing.T, at netip.AddrPort, row bpf.Service) {
	t.Helper()
	for _, proto := range []uint8{model.ProtoTCP, model.ProtoUDP} {
		nd.put(t, "lash_services", &bpf.ServiceKey{Addr: bpf.AddrFrom(at.Addr()), Port: bpf.ToBE16(at.Port()), Proto: proto}, &row)
	}
}

// own gives a port to the node.
func (nd *node) own(t *testing.T, port uint16) {
	t.Helper()
	use := uint8(bpf.PortNode)
	nd.put(t, "lash_ports", uint32(port), &use)
}

func (nd *node) put(t *testing.T, name string, key, value any) {
	t.Helper()
	if err := nd.dp.Map(name).Put(key, value); err != nil {
		t.Fatalf("%s: %v", name, err)
	}
}

// rows counts a map's.
func (nd *node) rows(t *testing.T, name string) (n int) {
	t.Helper()
	var k, v []byte
	it := nd.dp.Map(name).Iterate()
	for it.Next(&k, &v) {
		n++
	}
	if err := it.Err(); err != nil {
		t.Fatal(err)
	}
	return n
}

func forget(t *testing.T, m *ebpf.Map, key any) {
	t.Helper()
	if err := m.Delete(key); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		t.Fatal(err)
	}
}

// a family's addresses in these tests
type family struct {
	name      string
	vip       netip.Addr // a ClusterIP
	any       netip.Addr
	loopback  netip.Addr
	ofPod     func(*pod) netip.Addr
	ofNode    func(*node) netip.Addr
	ofRouter  func(*node) netip.Addr
	mappedToo bool // IPv6 sockets reach it, too
}

var families = []family{
	{name: "IPv4", vip: addr("10.96.0.10"), any: netip.IPv4Unspecified(), loopback: addr("127.0.0.1"), mappedToo: true,
		ofPod: func(p *pod) netip.Addr { return p.ip4 }, ofNode: func(n *node) netip.Addr { return n.ip4 }, ofRouter: (*node).router4},
	{name: "IPv6", vip: addr("fd96::10"), any: netip.IPv6Unspecified(), loopback: netip.IPv6Loopback(),
		ofPod: func(p *pod) netip.Addr { return p.ip6 }, ofNode: func(n *node) netip.Addr { return n.ip6 }, ofRouter: (*node).router6},
}

const (
	vipPort  = 80
	nodePort = 30080
	podPort  = 8080
	service  = 7
)

// services is a cluster whose first node has a service with a backend on each node.
type services struct {
	*cluster
	n1, n2        *node
	client        *pod // on the first node, no backend
	near, far     *pod // the backends
	group         *os.File
	inPod, onHost *client
}

func newServices(t *testing.T, o options) *services {
	t.Helper()
	o.podsPerNode = 2
	c := newCluster(t, o)
	s := &services{cluster: c, n1: c.nodes[0], n2: c.nodes[1]}
	s.client, s.near, s.far = s.n1.pods[0], s.n1.pods[1], s.n2.pods[0]
	for _, f := range families {
		announce(t, s.near.ns, netip.AddrPortFrom(f.ofPod(s.near), podPort), "near")
		announce(t, s.far.ns, netip.AddrPortFrom(f.ofPod(s.far), podPort), "far")
		row := bpf.Endpoint{Identity: uint32(model.IdentityHost), Flags: bpf.EndpointHost | bpf.EndpointNodePort}
		s.n1.put(t, "lash_endpoints", bpf.AddrFrom(f.ofNode(s.n1)), &row)
	}
	s.group = s.n1.cgroup(t)
	s.inPod, s.onHost = newClient(t, s.client.ns, s.group), newClient(t, s.n1.ns, s.group)
	return s
}

// backend is where a pod serves.
func (f family) backend(p *pod) netip.AddrPort { return netip.AddrPortFrom(f.ofPod(p), podPort) }

// id is a service port of each family.
func (f family) id() uint32 { return service + uint32(f.vip.BitLen()) }

func forEachFamily(t *testing.T, test func(*testing.T, family)) {
	t.Helper()
	for _, f := range families {
		t.Run(f.name, func(t *testing.T) { test(t, f) })
	}
}

// each transport, and IPv4 from an IPv6 socket.
func (f family) orders(to netip.AddrPort) (out []order) {
	for _, network := range []string{"tcp", "udp"} {
		out = append(out, order{Net: network, To: to})
		if f.mappedToo {
			out = append(out, order{Net: network, To: to, V6: true})
		}
	}
	return out
}

func TestSocketGetsABackendAndSeesTheFrontend(t *testing.T) {
	s := newServices(t, options{})
	forEachFamily(t, func(t *testing.T, f family) {
		vip := netip.AddrPortFrom(f.vip, vipPort)
		s.n1.backendsOf(t, f.id(), f.backend(s.near), f.backend(s.far))
		s.n1.front(t, vip, bpf.Service{ID: f.id(), First: 1, Count: 2, Local: 1})
		for _, o := range f.orders(vip) {
			for _, from := range []struct {
				*client
				addr netip.Addr
			}{{s.inPod, f.ofPod(s.client)}, {s.onHost, netip.Addr{}}} {
				got := map[string]int{}
				for range 40 {
					a := from.connect(t, o)
					got[a.server()]++
					if a.Peer != vip {
						t.Fatalf("%+v: the socket's peer is %s, want the frontend", o, a.Peer)
					}
					if from.addr.IsValid() && a.seen() != from.addr {
						t.Fatalf("%+v: the server saw %s, want %s", o, a.seen(), from.addr)
					}
				}
				if got["near"] == 0 || got["far"] == 0 || len(got) != 2 {
					t.Errorf("%+v: answers of %v, want both backends", o, got)
				}
			}
		}
	})
	if n := s.n1.rows(t, "lash_sock_rev"); n != 0 {
		t.Errorf("%d rows are left of sockets that are closed", n)
	}
}

// Where pods' sockets are to be left alone, pods are served packet by packet: who looks at their packets finds the frontend.
func TestOnlySocketsOfTheNodeAreTranslated(t *testing.T) {
	for name, o := range map[string]options{"native": {}, "legacy": {legacy: true}, "vxlan": {tunnel: "vxlan"}} {
		t.Run(name, func(t *testing.T) { onlySocketsOfTheNode(t, o) })
	}
}

func onlySocketsOfTheNode(t *testing.T, o options) {
	o.sockHostOnly = true
	s := newServices(t, o)
	forEachFamily(t, func(t *testing.T, f family) {
		vip := netip.AddrPortFrom(f.vip, vipPort)
		s.n1.backendsOf(t, f.id(), f.backend(s.near), f.backend(s.far))
		s.n1.front(t, vip, bpf.Service{ID: f.id(), First: 1, Count: 2, Local: 1})
		translated := func() (n int) {
			t.Helper()
			var k bpf.ConnKey
			var c bpf.Conn
			it := s.n1.dp.Map("lash_conn").Iterate()
			for it.Next(&k, &c) {
				if c.Service == f.id() && c.Flags&bpf.ConnDNAT != 0 {
					n++
				}
			}
			if err := it.Err(); err != nil {
				t.Fatal(err)
			}
			return n
		}
		for _, o := range f.orders(vip) {
			for _, from := range []struct {
				*client
				packets int
			}{{s.onHost, 0}, {s.inPod, 20}} {
				before := translated()
				for range 20 {
					if a := from.connect(t, o); a.Peer != vip || a.server() != "near" && a.server() != "far" {
						t.Fatalf("%+v: %+v", o, a)
					}
				}
				if n := translated() - before; n != from.packets {
					t.Errorf("%+v: %d of 20 connections are translated packet by packet, want %d", o, n, from.packets)
				}
			}
		}
	})
}

func TestNothingIsWrittenForWhatIsNoService(t *testing.T) {
	s := newServices(t, options{})
	forEachFamily(t, func(t *testing.T, f family) {
		for _, o := range f.orders(f.backend(s.near)) {
			o.Do = "connect"
			if a := s.inPod.ask(t, o); a.Errno != 0 || a.Peer != o.To {
				t.Errorf("%+v: %+v", o, a)
			}
			o.Do = "send"
			if a := s.inPod.ask(t, o); o.Net == "udp" && (a.Errno != 0 || a.Peer != o.To) {
				t.Errorf("%+v: %+v", o, a)
			}
		}
	})
	for _, m := range []string{"lash_sock_rev", "lash_sock_pin", "lash_affinity"} {
		if n := s.n1.rows(t, m); n != 0 {
			t.Errorf("%s has %d rows", m, n)
		}
	}
}

func TestRangesAtTheSocket(t *testing.T) {
	s := newServices(t, options{})
	forEachFamily(t, func(t *testing.T, f family) {
		vip := netip.AddrPortFrom(f.vip, vipPort)
		s.n1.backendsOf(t, f.id(), f.backend(s.near), f.backend(s.far))
		for _, tc := range []struct {
			name string
			row  bpf.Service
			want string
		}{
			{"internalTrafficPolicy Local", bpf.Service{First: 1, Count: 2, Local: 1, Flags: bpf.FrontendLocalIn}, "near"},
			{"externalTrafficPolicy Local is for those outside", bpf.Service{First: 2, Count: 1, Local: 1, Flags: bpf.FrontendLocalOut | bpf.FrontendOutside}, "far"},
			{"the cluster's range begins behind a local one", bpf.Service{First: 2, Count: 1, Local: 1}, "far"},
		} {
			tc.row.ID = f.id()
			s.n1.front(t, vip, tc.row)
			for range 10 {
				for _, o := range f.orders(vip) {
					if a := s.inPod.connect(t, o); a.server() != tc.want {
						t.Fatalf("%s: %+v went to %s", tc.name, o, a.server())
					}
				}
			}
		}
	})
}

// Where a NodePort is served at the socket, and where it is not. Node 2 has no services: what reaches it is answered by
// a process of its own.
func TestNodePortAtTheSocket(t *testing.T) {
	s := newServices(t, options{})
	forEachFamily(t, func(t *testing.T, f family) {
		at := func(a netip.Addr) netip.AddrPort { return netip.AddrPortFrom(a, nodePort) }
		s.n1.backendsOf(t, f.id(), f.backend(s.near))
		s.n1.own(t, nodePort)
		announce(t, s.n2.ns, at(f.ofNode(s.n2)), "node2")
		announce(t, s.client.ns, at(f.loopback), "client-itself")
		announce(t, s.n1.ns, at(f.ofRouter(s.n1)), "router")
		for _, flags := range []uint32{bpf.FrontendOutside, bpf.FrontendOutside | bpf.FrontendLocalOut} {
			remote := "near"
			if flags&bpf.FrontendLocalOut != 0 {
				remote = "node2"
			}
			s.n1.front(t, at(f.any), bpf.Service{ID: f.id(), First: 1, Count: 1, Local: 1, Flags: flags})
			for _, tc := range []struct {
				from *client
				name string
				to   netip.Addr
				want string
			}{
				{s.inPod, "pod", f.ofNode(s.n1), "near"},
				{s.inPod, "pod", f.ofNode(s.n2), remote},
				{s.inPod, "pod", f.loopback, "client-itself"},
				{s.inPod, "pod", f.any, "client-itself"},
				{s.inPod, "pod", f.ofRouter(s.n1), "router"},
				{s.onHost, "host", f.ofNode(s.n1), "near"},
				{s.onHost, "host", f.ofNode(s.n2), remote},
				{s.onHost, "host", f.loopback, "near"},
				{s.onHost, "host", f.any, "near"},
				{s.onHost, "host", f.ofRouter(s.n1), "router"},
			} {
				for _, o := range f.orders(at(tc.to)) {
					if a := tc.from.connect(t, o); a.server() != tc.want {
						t.Errorf("flags %d: from a %s, %+v was answered by %s, want %s", flags, tc.name, o, a.server(), tc.want)
					}
				}
			}
		}
	})
}

// A HostPort may be of one address; that of loopback is the node's own, not each pod's.
func TestHostPortOfLoopback(t *testing.T) {
	s := newServices(t, options{})
	forEachFamily(t, func(t *testing.T, f family) {
		at := netip.AddrPortFrom(f.loopback, 9090)
		s.n1.own(t, at.Port())
		s.n1.backendsOf(t, f.id(), f.backend(s.near))
		s.n1.front(t, at, bpf.Service{ID: f.id(), First: 1, Count: 1, Local: 1, Flags: bpf.FrontendOutside | bpf.FrontendLocalIn | bpf.FrontendLocalOut})
		announce(t, s.client.ns, at, "client-itself")
		for _, o := range f.orders(at) {
			if a := s.inPod.connect(t, o); a.server() != "client-itself" {
				t.Errorf("from a pod, %+v was answered by %s", o, a.server())
			}
			if a := s.onHost.connect(t, o); a.server() != "near" {
				t.Errorf("from the host, %+v was answered by %s", o, a.server())
			}
		}
	})
}

func TestAffinityAtTheSocket(t *testing.T) {
	s := newServices(t, options{})
	forEachFamily(t, func(t *testing.T, f family) {
		vip := netip.AddrPortFrom(f.vip, vipPort)
		only := func(p *pod) { // new clients go to this one alone
			s.n1.put(t, "lash_backends", &bpf.BackendKey{Service: f.id(), Slot: 1}, &bpf.Backend{Addr: bpf.AddrFrom(f.ofPod(p)), Port: bpf.ToBE16(podPort)})
		}
		s.n1.backendsOf(t, f.id(), f.backend(s.near), f.backend(s.far))
		s.n1.front(t, vip, bpf.Service{ID: f.id(), First: 1, Count: 1, Affinity: 2})
		want := func(what string, from *client, server string) {
			t.Helper()
			for _, o := range f.orders(vip) {
				if a := from.connect(t, o); a.server() != server {
					t.Errorf("%s: %+v was answered by %s, want %s", what, o, a.server(), server)
				}
			}
		}
		only(s.near)
		want("first", s.inPod, "near")
		only(s.far)
		want("the pod keeps its backend", s.inPod, "near")
		want("the host is another client", s.onHost, "far")
		time.Sleep(1500 * time.Millisecond)
		want("within the timeout", s.inPod, "near")
		time.Sleep(1500 * time.Millisecond)
		want("each connection starts the timeout anew", s.inPod, "near")
		time.Sleep(2500 * time.Millisecond)
		want("after the timeout", s.inPod, "far")
		only(s.near)
		want("again", s.inPod, "far")
		s.n1.member(t, f.id(), f.backend(s.far), bpf.MemberKeeps)
		want("the backend takes no new connections", s.inPod, "near")
		s.n1.member(t, f.id(), f.backend(s.far), bpf.MemberActive)
		only(s.far)
		forget(t, s.n1.dp.Map("lash_members"), memberKey(f.id(), f.backend(s.near)))
		want("the backend is gone", s.inPod, "far")
		// The same clients by a frontend that only this node's backends serve.
		s.n1.member(t, f.id(), f.backend(s.near), bpf.MemberActive)
		only(s.near)
		s.n1.front(t, vip, bpf.Service{ID: f.id(), First: 1, Count: 1, Local: 1, Affinity: 2, Flags: bpf.FrontendLocalIn})
		want("the client's backend is on another node", s.inPod, "near")
	})
}

func TestDatagramsOfASocketStayWithTheirBackend(t *testing.T) {
	s := newServices(t, options{})
	forEachFamily(t, func(t *testing.T, f family) {
		vip, second := netip.AddrPortFrom(f.vip, vipPort), netip.AddrPortFrom(f.vip, vipPort+1)
		s.n1.backendsOf(t, f.id(), f.backend(s.near), f.backend(s.far))
		s.n1.backendsOf(t, f.id()+1, f.backend(s.near), f.backend(s.far))
		s.n1.front(t, vip, bpf.Service{ID: f.id(), First: 1, Count: 2, Local: 1})
		s.n1.front(t, second, bpf.Service{ID: f.id() + 1, First: 2, Count: 1, Local: 1})
		for _, v6 := range []bool{false, f.mappedToo} {
			o := order{Do: "send", Net: "udp", To: vip, V6: v6}
			used := map[string]bool{}
			for range 20 {
				a := s.inPod.ask(t, o)
				first := a
				for range 10 {
					if a.Errno != 0 || a.server() != first.server() || a.Peer != vip {
						t.Fatalf("%+v, then %+v", first, a)
					}
					used[a.server()] = true
					a = s.inPod.ask(t, order{Do: "send", Net: "udp", To: vip, V6: v6, Socket: first.Socket})
				}
				// Another frontend by the same socket has a backend of its own.
				if b := s.inPod.ask(t, order{Do: "send", Net: "udp", To: second, V6: v6, Socket: first.Socket}); first.server() == "near" && (b.server() != "far" || b.Peer != second) {
					t.Fatalf("the second frontend: %+v", b)
				}
				s.inPod.ask(t, order{Do: "close", Socket: first.Socket})
			}
			if !used["near"] || !used["far"] {
				t.Errorf("sockets were sent to %v only", used)
			}

			// To one that is about to go, and then is gone.
			s.n1.front(t, vip, bpf.Service{ID: f.id(), First: 1, Count: 1, Local: 1})
			a := s.inPod.ask(t, o)
			o.Socket = a.Socket
			s.n1.front(t, vip, bpf.Service{ID: f.id(), First: 2, Count: 1})
			s.n1.member(t, f.id(), f.backend(s.near), bpf.MemberKeeps)
			if a = s.inPod.ask(t, o); a.server() != "near" || a.Peer != vip {
				t.Errorf("while the backend terminates: %+v", a)
			}
			s.n1.front(t, vip, bpf.Service{ID: f.id()})
			if a = s.inPod.ask(t, o); a.server() != "near" || a.Peer != vip {
				t.Errorf("while the service has only that one: %+v", a)
			}
			s.n1.front(t, vip, bpf.Service{ID: f.id(), First: 2, Count: 1})
			forget(t, s.n1.dp.Map("lash_members"), memberKey(f.id(), f.backend(s.near)))
			if a = s.inPod.ask(t, o); a.server() != "far" || a.Peer != vip {
				t.Errorf("after the backend has gone: %+v", a)
			}
			// A row that was evicted is written again.
			it, key, rev := s.n1.dp.Map("lash_sock_rev").Iterate(), bpf.SockRevKey{}, bpf.SockRev{}
			var keys []bpf.SockRevKey
			for it.Next(&key, &rev) {
				keys = append(keys, key)
			}
			for _, k := range keys {
				forget(t, s.n1.dp.Map("lash_sock_rev"), &k)
			}
			if a = s.inPod.ask(t, o); a.Peer != vip || len(keys) == 0 {
				t.Errorf("after the eviction of %d rows: %+v", len(keys), a)
			}
			s.n1.front(t, vip, bpf.Service{ID: f.id(), First: 1, Count: 2, Local: 1})
			s.n1.member(t, f.id(), f.backend(s.near), bpf.MemberActive)
		}
	})
}

func TestServiceWithoutBackendsRefusesTheSocket(t *testing.T) {
	for _, drop := range []bool{false, true} {
		s := newServices(t, options{dropNoBackend: drop})
		forEachFamily(t, func(t *testing.T, f family) {
			vip := netip.AddrPortFrom(f.vip, vipPort)
			for _, row := range []bpf.Service{{ID: f.id()}, {ID: f.id(), First: 1, Count: 1, Flags: bpf.FrontendLocalIn}} {
				s.n1.front(t, vip, row)
				for _, o := range f.orders(vip) {
					for _, do := range []string{"connect", "send"} {
						o.Do, o.Wait = do, 200*time.Millisecond
						if do == "send" && o.Net == "tcp" {
							continue
						}
						want := syscall.ECONNREFUSED
						if !s.n1.dp.Features().SetRetval {
							want = syscall.EPERM
						}
						if a := s.inPod.ask(t, o); (a.Errno == want) == drop || a.Errno == 0 {
							t.Errorf("drop %v: %+v gave %v", drop, o, a.Errno)
						}
					}
				}
			}
		})
	}
}

// A pod that is given itself keeps its own address: it answers by loopback.
func TestHairpinKeepsThePodsAddress(t *testing.T) {
	s := newServices(t, options{})
	self := newClient(t, s.near.ns, s.group)
	forEachFamily(t, func(t *testing.T, f family) {
		vip := netip.AddrPortFrom(f.vip, vipPort)
		s.n1.backendsOf(t, f.id(), f.backend(s.near))
		s.n1.front(t, vip, bpf.Service{ID: f.id(), First: 1, Count: 1, Local: 1})
		for _, o := range f.orders(vip) {
			if a := self.connect(t, o); a.server() != "near" || a.seen() != f.ofPod(s.near) || a.Local.Addr() != f.ofPod(s.near) || a.Peer != vip {
				t.Errorf("%+v: %+v", o, a)
			}
			o.Do = "send"
			if a := self.ask(t, o); o.Net == "udp" && (a.server() != "near" || a.seen() != f.ofPod(s.near) || a.Peer != vip) {
				t.Errorf("%+v: %+v", o, a)
			}
		}
	})
}

func TestPortsOfTheNodeCannotBeBound(t *testing.T) {
	s := newServices(t, options{})
	const inUse = syscall.EADDRINUSE
	taken := inUse
	if !s.n1.dp.Features().SetRetval {
		taken = syscall.EPERM
	}
	forEachFamily(t, func(t *testing.T, f family) {
		const ofAll, ofLoopback, unused = 30081, 30082, 30083
		s.n1.own(t, ofAll)
		s.n1.own(t, ofLoopback)
		tcp := func(a netip.Addr, port uint16) *bpf.ServiceKey {
			return &bpf.ServiceKey{Addr: bpf.AddrFrom(a), Port: bpf.ToBE16(port), Proto: model.ProtoTCP}
		}
		for _, k := range []*bpf.ServiceKey{tcp(f.any, ofAll), tcp(f.loopback, ofLoopback)} {
			s.n1.put(t, "lash_services", k, &bpf.Service{ID: f.id(), Flags: bpf.FrontendOutside})
			defer forget(t, s.n1.dp.Map("lash_services"), k)
		}
		bind := func(network string, a netip.Addr, port uint16) order {
			return order{Do: "bind", Net: network, To: netip.AddrPortFrom(a, port)}
		}
		for _, a := range []netip.Addr{f.any, f.loopback, f.ofNode(s.n1)} {
			s.onHost.refused(t, bind("tcp", a, ofAll), taken)
			s.onHost.refused(t, bind("udp", a, ofAll), 0)
			s.onHost.refused(t, bind("tcp", a, unused), 0)
			s.onHost.refused(t, bind("tcp", a, 0), 0)
		}
		s.onHost.refused(t, bind("tcp", netip.IPv6Unspecified(), ofAll), taken) // an IPv6 socket may serve both
		s.onHost.refused(t, bind("tcp", f.ofRouter(s.n1), ofAll), 0)            // not served there
		s.onHost.refused(t, bind("tcp", f.loopback, ofLoopback), taken)
		s.onHost.refused(t, bind("tcp", f.ofNode(s.n1), ofLoopback), 0)
		for _, a := range []netip.Addr{f.any, f.loopback, f.ofPod(s.client)} {
			s.inPod.refused(t, bind("tcp", a, ofAll), 0)
		}
	})
}

// Backends come and go while clients connect: none is refused, and none is given one that is gone before its row.
func TestBackendsChangeUnderConnects(t *testing.T) {
	s := newServices(t, options{})
	f := families[0]
	vip := netip.AddrPortFrom(f.vip, vipPort)
	s.n1.backendsOf(t, f.id(), f.backend(s.near), f.backend(s.far))
	s.n1.front(t, vip, bpf.Service{ID: f.id(), First: 1, Count: 2, Local: 1})
	stop, done := make(chan struct{}), make(chan int)
	go func() {
		second := &bpf.BackendKey{Service: f.id(), Slot: 2}
		changes := 0
		for ; ; changes++ {
			select {
			case <-stop:
				done <- changes
				return
			default:
			}
			s.n1.front(t, vip, bpf.Service{ID: f.id(), First: 1, Count: 1, Local: 1})
			forget(t, s.n1.dp.Map("lash_backends"), second)
			s.n1.put(t, "lash_backends", second, &bpf.Backend{Addr: bpf.AddrFrom(f.ofPod(s.far)), Port: bpf.ToBE16(podPort)})
			s.n1.front(t, vip, bpf.Service{ID: f.id(), First: 1, Count: 2, Local: 1})
		}
	}()
	for range 2000 {
		s.inPod.connect(t, order{Net: "udp", To: vip})
	}
	close(stop)
	t.Logf("%d changes during 2000 connects", <-done)
}

func TestSocketsAreTranslatedWithoutTheAgent(t *testing.T) {
	s := newServices(t, options{})
	forEachFamily(t, func(t *testing.T, f family) {
		vip := netip.AddrPortFrom(f.vip, vipPort)
		s.n1.backendsOf(t, f.id(), f.backend(s.near))
		s.n1.front(t, vip, bpf.Service{ID: f.id(), First: 1, Count: 1, Local: 1})
	})
	s.n1.do(t, "the agent ends", s.n1.dp.Close)
	forEachFamily(t, func(t *testing.T, f family) {
		vip := netip.AddrPortFrom(f.vip, vipPort)
		for _, o := range f.orders(vip) {
			if a := s.inPod.connect(t, o); a.server() != "near" || a.Peer != vip {
				t.Errorf("%+v: %+v", o, a)
			}
		}
	})
}
