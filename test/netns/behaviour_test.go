// SPDX-License-Identifier: Apache-2.0

package netns

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/lash-net/lash/internal/testutil"
)

// forwarded is how many packets the namespace's own IP stack forwarded, by family.
func forwarded(t *testing.T, ns *os.File) (v4, v6 int) {
	t.Helper()
	lines := strings.Split(testutil.In(t, ns, "cat", "/proc/net/snmp"), "\n")
	for i := 1; i < len(lines); i++ {
		if names := strings.Fields(lines[i-1]); strings.HasPrefix(lines[i], "Ip:") && names[1] == "Forwarding" {
			for k, name := range names {
				if name == "ForwDatagrams" {
					v4, _ = strconv.Atoi(strings.Fields(lines[i])[k])
				}
			}
		}
	}
	for line := range strings.Lines(testutil.In(t, ns, "cat", "/proc/net/snmp6")) {
		if f := strings.Fields(line); f[0] == "Ip6OutForwDatagrams" {
			v6, _ = strconv.Atoi(f[1])
		}
	}
	return v4, v6
}

func TestBPFHostRoutingBypassesTheStack(t *testing.T) {
	for _, legacy := range []bool{false, true} {
		c := newCluster(t, options{podsPerNode: 1, legacy: legacy})
		a, far := c.nodes[0].pods[0], c.nodes[1].pods[0]
		for _, dst := range []netip.Addr{far.ip4, far.ip6} {
			if _, err := exchange(a.ns, serve(t, far.ns, dst), 1<<20); err != nil {
				t.Fatal(err)
			}
		}
		for _, n := range c.nodes {
			v4, v6 := forwarded(t, n.ns)
			if stack := v4 > 0 && v6 > 0; stack != legacy || !legacy && v4+v6 > 0 {
				t.Errorf("legacy %v, node %d: the stack forwarded %d IPv4 and %d IPv6 packets", legacy, n.n, v4, v6)
			}
		}
	}
}

// The node knows no neighbour, and a burst goes out before the first one has answered.
func TestColdNeighbourLosesNoPacket(t *testing.T) {
	c := newCluster(t, options{podsPerNode: 1})
	a, far := c.nodes[0].pods[0], c.nodes[1].pods[0]
	for _, dst := range []netip.Addr{far.ip4, far.ip6} {
		for _, n := range c.nodes {
			ip(t, n.ns, "neigh flush dev eth0")
			for _, other := range c.nodes { // link-local ones come back by themselves, and matter to nobody
				for _, a := range []netip.Addr{other.ip4, other.ip6} {
					if known := testutil.In(t, n.ns, "ip", "neigh", "show", a.String(), "dev", "eth0"); strings.Contains(known, "lladdr") {
						t.Fatalf("node %d still knows %s", n.n, known)
					}
				}
			}
		}
		if out, err := try(a.ns, "ping", "-n", "-c", "3", "-l", "3", "-W", "3", dst.String()); err != nil || !strings.Contains(out, " 0% packet loss") {
			t.Errorf("first packets to %s: %v\n%s", dst, err, out)
		}
	}
}

// A connection that is established follows the node's routes as soon as its decision is due, about a second: without
// any agent that could tell it.
func TestRouteChangedByHandIsFollowed(t *testing.T) {
	c := newCluster(t, options{podsPerNode: 1})
	n1, n2 := c.nodes[0], c.nodes[1]
	a, far := n1.pods[0], n2.pods[0]
	for _, tc := range []struct {
		dst         netip.Addr
		cidr        netip.Prefix
		right, away string
	}{{far.ip4, n2.cidr4(), n2.ip4.String(), "172.18.0.99"}, {far.ip6, n2.cidr6(), n2.ip6.String(), "fd18::99"}} {
		at := serve(t, far.ns, tc.dst)
		if err := inNS(a.ns, func() error {
			u, err := net.Dial("udp", at.String())
			if err != nil {
				return err
			}
			defer u.Close()
			reach := func() bool {
				for buf := make([]byte, 16); ; {
					u.SetDeadline(time.Now().Add(200 * time.Millisecond))
					if _, err := u.Write([]byte("hello")); err != nil {
						continue // what the stack says about the one before
					}
					_, err := u.Read(buf)
					return err == nil
				}
			}
			until := func(want bool) error {
				for deadline := time.Now().Add(4 * time.Second); reach() != want; {
					if time.Now().After(deadline) {
						return fmt.Errorf("%s reachable: %v, 4 s after the change", tc.dst, !want)
					}
				}
				return nil
			}
			if err := until(true); err != nil {
				return err
			}
			for _, via := range []string{tc.away, tc.right} {
				if out, err := try(n1.ns, "ip", "route", "replace", tc.cidr.String(), "via", via, "dev", "eth0"); err != nil {
					return fmt.Errorf("route via %s: %w\n%s", via, err, out)
				}
				if err := until(via == tc.right); err != nil {
					return err
				}
			}
			return nil
		}); err != nil {
			t.Error(err)
		}
	}
}

func TestStackAnswersWhatCannotGoOn(t *testing.T) {
	c := newCluster(t, options{podsPerNode: 1})
	n1, n2 := c.nodes[0], c.nodes[1]
	a, far := n1.pods[0], n2.pods[0]
	if out, _ := try(a.ns, "ping", "-n", "-c", "1", "-t", "1", "-W", "2", far.ip4.String()); !strings.Contains(out, "Time to live exceeded") {
		t.Errorf("TTL 1 gave no answer:\n%s", out)
	}
	if out, _ := try(a.ns, "ping", "-n", "-c", "1", "-t", "1", "-W", "2", far.ip6.String()); !strings.Contains(out, "Hop limit") {
		t.Errorf("hop limit 1 gave no answer:\n%s", out)
	}
	ip(t, n1.ns, fmt.Sprintf("route replace %s via %s dev eth0 mtu lock 1400", n2.cidr4(), n2.ip4))
	if err := n1.dp.Raise("route changed"); err != nil {
		t.Fatal(err)
	}
	if out, _ := try(a.ns, "ping", "-n", "-c", "2", "-M", "do", "-s", "1440", "-W", "2", far.ip4.String()); !strings.Contains(strings.ToLower(out), "frag needed") && !strings.Contains(out, "mtu=1400") && !strings.Contains(out, "mtu = 1400") {
		t.Errorf("a packet larger than the route's MTU gave no answer:\n%s", out)
	}
}

// dropped is how many packets the node dropped for a reason.
func dropped(t *testing.T, n *node, reason string) (total int) {
	t.Helper()
	n.do(t, "metrics", func() error {
		_, rows, err := n.dp.Dump("metrics")
		for _, r := range rows {
			if r[0] == reason && r[5] != "" {
				k, _ := strconv.Atoi(r[2])
				total += k
			}
		}
		return err
	})
	return total
}

func TestNobodySendsUnderAnothersAddress(t *testing.T) {
	c := newCluster(t, options{podsPerNode: 2})
	n := c.nodes[0]
	a, b := n.pods[0], n.pods[1]
	ip(t, a.ns, "addr add 10.0.1.77/32 dev eth0", "addr add fd00:0:0:1::77/128 dev eth0 nodad")
	for _, pair := range [][2]string{{"10.0.1.77", b.ip4.String()}, {"fd00:0:0:1::77", b.ip6.String()}} {
		before := dropped(t, n, "Invalid source ip")
		if out, err := try(a.ns, "ping", "-n", "-c", "1", "-W", "1", "-I", pair[0], pair[1]); err == nil {
			t.Errorf("%s got through\n%s", pair[0], out)
		}
		if after := dropped(t, n, "Invalid source ip"); after <= before {
			t.Errorf("the drop of %s was not counted", pair[0])
		}
	}
}

func TestForwardingGoesOnWithoutTheAgent(t *testing.T) {
	c := newCluster(t, options{podsPerNode: 1})
	a, far := c.nodes[0].pods[0], c.nodes[1].pods[0]
	at := serve(t, far.ns, far.ip4)
	for _, n := range c.nodes {
		n.do(t, "close", n.dp.Close)
	}
	if _, err := exchange(a.ns, at, 1<<20); err != nil {
		t.Errorf("new connection without an agent: %v", err)
	}
	// Another agent, with its programs anew, under a running ping.
	done := make(chan error)
	go func() {
		out, err := try(a.ns, "ping", "-n", "-q", "-c", "300", "-i", "0.005", far.ip4.String())
		if err == nil && !strings.Contains(out, " 0% packet loss") {
			err = fmt.Errorf("packets were lost:\n%s", out)
		}
		done <- err
	}()
	n := c.nodes[0]
	n.do(t, "open again", func() error {
		if err := n.open(c, options{}); err != nil {
			return err
		}
		return n.dp.AttachPod(a.ifindex, a.name)
	})
	if err := <-done; err != nil {
		t.Error(err)
	}
}

func TestSweepRemovesWhatIsGone(t *testing.T) {
	c := newCluster(t, options{podsPerNode: 2})
	n := c.nodes[0]
	a, b := n.pods[0], n.pods[1]
	if _, err := exchange(a.ns, serve(t, b.ns, b.ip4), 1000); err != nil {
		t.Fatal(err)
	}
	n.do(t, "sweep", func() error {
		ctx := context.Background()
		if err := n.dp.Endpoints().Delete(ctx, b.ip4); err != nil {
			return err
		}
		s, err := n.dp.Sweep(ctx)
		if err != nil {
			return err
		}
		if s.Orphaned == 0 {
			return fmt.Errorf("nothing of the departed pod was removed: %+v", s)
		}
		s, err = n.dp.Sweep(ctx)
		if err == nil && s.Orphaned+s.Expired != 0 {
			err = fmt.Errorf("the second sweep found %+v", s)
		}
		return err
	})
}
