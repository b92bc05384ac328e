// SPDX-License-Identifier: Apache-2.0

package netns

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/lash-net/lash/internal/model"
)

func TestDatagramsGetAnotherBackend(t *testing.T) {
	testDatagramsGetAnotherBackend(t, options{podsPerNode: 2})
}
func TestDatagramsGetAnotherBackendDSR(t *testing.T) {
	testDatagramsGetAnotherBackend(t, options{podsPerNode: 2, dsr: true})
}
func TestDatagramsGetAnotherBackendVXLAN(t *testing.T) {
	testDatagramsGetAnotherBackend(t, options{podsPerNode: 2, tunnel: "vxlan"})
}
func TestDatagramsGetAnotherBackendXDP(t *testing.T) {
	testDatagramsGetAnotherBackend(t, options{podsPerNode: 2, xdp: true})
}
func TestDatagramsGetAnotherBackendXDPDSR(t *testing.T) {
	testDatagramsGetAnotherBackend(t, options{podsPerNode: 2, xdp: true, dsr: true})
}

// While a backend is taken away the answers of it that are under way have no connection any more: that is the time between
// the first change and the end of forgetting, and how long an answer takes on a busy machine.
const answerTakes = 50 * time.Millisecond

// testDatagramsGetAnotherBackend: a client that sends a datagram each millisecond, packet by packet, has its backend taken
// away again and again, which lives on. Every datagram reaches a backend. Lost is only what was answered while the agent
// forgot. What is sent afterwards goes to the new backend.
func testDatagramsGetAnotherBackend(t *testing.T, o options) {
	c := newCluster(t, o)
	n1, n2 := c.nodes[0], c.nodes[1]
	for _, v6 := range []bool{false, true} {
		of := func(ip4, ip6 netip.Addr) netip.Addr {
			if v6 {
				return ip6
			}
			return ip4
		}
		// Of another node, of the client's own, of another node.
		places := []*pod{n2.pods[0], n1.pods[1], n2.pods[1]}
		backends := make([]netip.Addr, len(places))
		var heard sync.Map // when a backend answered, by the datagram's text
		for i, p := range places {
			backends[i] = of(p.ip4, p.ip6)
			nameItself(t, p.ns, netip.AddrPortFrom(backends[i], servedPort), fmt.Sprint(i), &heard)
		}
		id := uint32(11)
		if v6 {
			id = 12
		}
		vip, node := netip.AddrPortFrom(of(addr("198.18.0.7"), addr("fd98::7")), vipPort), netip.AddrPortFrom(of(n1.ip4, n1.ip6), nodePort+1)
		serve := func(backend int) {
			t.Helper()
			for _, nd := range c.nodes {
				at := backends[backend]
				local := nd.cidr4().Contains(at) || nd.cidr6().Contains(at)
				key := func(a netip.Addr, port uint16) model.FrontendKey {
					return model.FrontendKey{Addr: a, L4: model.L4{Proto: unix.IPPROTO_UDP, Port: port}}
				}
				row := model.ServicePort{ID: id, Proto: unix.IPPROTO_UDP, IPv6: v6, Backends: []model.Backend{{Addr: at, Port: servedPort, Local: local, Cluster: true}},
					Frontends: []model.Frontend{{FrontendKey: key(vip.Addr(), vip.Port())},
						{FrontendKey: key(of(netip.IPv4Unspecified(), netip.IPv6Unspecified()), node.Port()), Outside: true, DSR: o.dsr, Node: true}}}
				nd.do(t, "service", func() error {
					for _, a := range []netip.Addr{nd.ip4, nd.ip6} {
						if err := nd.dp.Endpoints().Put(t.Context(), a, model.LocalAddr{Host: true, Identity: model.IdentityHost, NodePort: true}); err != nil {
							return err
						}
					}
					if err := nd.dp.ServicePorts().Put(t.Context(), id, row); err != nil {
						return err
					}
					_, err := nd.dp.Forget(t.Context(), nil)
					return err
				})
			}
		}
		for _, way := range []struct {
			name     string
			from     *os.File
			frontend netip.AddrPort
		}{
			{"VIP from a pod", n1.pods[0].ns, vip},
			{"NodePort from outside", c.outside, node},
		} {
			t.Run(fmt.Sprintf("%s, IPv%d", way.name, map[bool]int{false: 4, true: 6}[v6]), func(t *testing.T) {
				serve(0)
				flow := startDatagrams(t, way.from, way.frontend)
				const moves = 6
				var begun, forgotten [moves + 1]time.Time
				for i := range moves {
					time.Sleep(300 * time.Millisecond)
					begun[i] = time.Now()
					serve((i + 1) % len(backends))
					forgotten[i] = time.Now()
				}
				time.Sleep(300 * time.Millisecond)
				begun[moves] = time.Now().Add(time.Hour)
				sent := flow.stop()
				underWay, wrong := 0, 0
				for n, s := range sent {
					next := 0 // the first move that it may have met
					for next < moves && s.at.After(forgotten[next]) {
						next++
					}
					at, got := heard.Load(flow.text(n))
					problem := ""
					switch now, then := fmt.Sprint(next%len(backends)), fmt.Sprint((next+1)%len(backends)); {
					case !got:
						problem = "no backend got it"
					case s.by == "" && at.(time.Time).Add(answerTakes).Before(begun[next]):
						problem = fmt.Sprintf("it was answered %s before anything changed, and the answer did not arrive", begun[next].Sub(at.(time.Time)))
					case s.by == "":
						underWay++
					case s.by != now && s.by != then:
						problem = fmt.Sprintf("backend %s answered it, want %s", s.by, now)
					}
					if problem == "" {
						continue
					}
					if wrong++; wrong < 5 {
						t.Errorf("datagram %d, sent %s before change %d: %s", n, begun[next].Sub(s.at), next+1, problem)
					}
				}
				t.Logf("%d datagrams, %d changes: %d were answered meanwhile, for nobody", len(sent), moves, underWay)
				if wrong > 0 {
					t.Errorf("%d of them went wrong", wrong)
					n1.dump(t)
				}
			})
		}
	}
}

// nameItself answers datagrams with themselves and a name, and writes down when.
func nameItself(t *testing.T, ns *os.File, at netip.AddrPort, name string, heard *sync.Map) {
	t.Helper()
	if err := inNS(ns, func() error {
		u, err := net.ListenPacket("udp", at.String())
		if err != nil {
			return err
		}
		t.Cleanup(func() { u.Close() })
		go func() {
			buf := make([]byte, 100)
			for {
				n, from, err := u.ReadFrom(buf)
				if err != nil {
					return
				}
				heard.Store(string(buf[:n]), time.Now())
				_, _ = u.WriteTo([]byte(string(buf[:n])+" "+name), from)
			}
		}()
		return nil
	}); err != nil {
		t.Fatal(err)
	}
}

// askedOne is a datagram that was sent, and who answered it.
type askedOne struct {
	at time.Time
	by string
}

type datagrams struct {
	to   netip.AddrPort
	conn net.PacketConn
	mu   sync.Mutex
	sent []askedOne
	end  chan struct{}
	done sync.WaitGroup
}

// startDatagrams sends one each millisecond from an unconnected socket until stop.
func startDatagrams(t *testing.T, ns *os.File, to netip.AddrPort) *datagrams {
	t.Helper()
	f := &datagrams{to: to, end: make(chan struct{})}
	if err := inNS(ns, func() (err error) { f.conn, err = net.ListenPacket("udp", ":0"); return err }); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.conn.Close() })
	f.done.Go(func() {
		tick := time.NewTicker(time.Millisecond)
		defer tick.Stop()
		for {
			select {
			case <-f.end:
				return
			case <-tick.C:
			}
			f.mu.Lock()
			n := len(f.sent)
			f.sent = append(f.sent, askedOne{at: time.Now()})
			f.mu.Unlock()
			if _, err := f.conn.WriteTo([]byte(f.text(n)), net.UDPAddrFromAddrPort(to)); err != nil {
				t.Errorf("datagram %d: %v", n, err)
			}
		}
	})
	go func() {
		buf := make([]byte, 100)
		for {
			n, from, err := f.conn.ReadFrom(buf)
			if err != nil {
				return
			}
			var number int
			var frontend, by string
			who := from.(*net.UDPAddr).AddrPort()
			if netip.AddrPortFrom(who.Addr().Unmap(), who.Port()) != to {
				continue // from a backend itself, whose connection was forgotten when it answered
			}
			if _, err := fmt.Sscan(string(buf[:n]), &number, &frontend, &by); err != nil {
				t.Errorf("answer %q: %v", buf[:n], err)
				continue
			}
			f.mu.Lock()
			f.sent[number].by = by
			f.mu.Unlock()
		}
	}()
	return f
}

// text of a datagram, as no other flow has it.
func (f *datagrams) text(n int) string { return fmt.Sprint(n, " ", f.to) }

func (f *datagrams) stop() []askedOne {
	close(f.end)
	f.done.Wait()
	time.Sleep(200 * time.Millisecond) // answers under way
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.sent
}
