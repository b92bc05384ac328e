// SPDX-License-Identifier: Apache-2.0

package netns

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"testing"

	"github.com/lash-net/lash/internal/testutil"
)

// takenIn is how many bytes a device has handed to its namespace.
func takenIn(t *testing.T, ns *os.File, device string) (bytes uint64) {
	t.Helper()
	var links []struct {
		Stats struct {
			RX struct{ Bytes uint64 }
		} `json:"stats64"`
	}
	out := testutil.In(t, ns, "ip", "-s", "-j", "link", "show", device)
	if err := json.Unmarshal([]byte(out), &links); err != nil || len(links) != 1 {
		t.Fatalf("%v\n%s", err, out)
	}
	return links[0].Stats.RX.Bytes
}

// A stream is taken out of the tunnel where it arrives, in packets that are many in one, and the tunnel's device does not get
// it. A pod that sends it on, to a machine or a container of its own which has the pod's address, can do so even if the
// way there segments nothing.
func TestVXLANStreamsPassTheTunnelsDevice(t *testing.T) {
	const size = 8 << 20
	c := newCluster(t, options{podsPerNode: 1, tunnel: "vxlan"})
	a, far, node := c.nodes[0].pods[0], c.nodes[1].pods[0], c.nodes[1]
	stream := func(t *testing.T, at netip.AddrPort) {
		t.Helper()
		before := takenIn(t, node.ns, "lash_tunnel")
		if _, err := exchange(a.ns, at, size); err != nil {
			t.Fatal(err)
		}
		if n := takenIn(t, node.ns, "lash_tunnel") - before; (at.Addr().Is4() || testutil.KernelAtLeast(t, 6, 3)) && n > size/8 {
			t.Errorf("the tunnel's device got %d bytes of a stream of %d", n, size)
		}
	}
	for _, dst := range []netip.Addr{far.ip4, far.ip6} {
		stream(t, serve(t, far.ns, dst))
	}

	machine := testutil.Netns(t)
	// A device that loses its last address loses its routes.
	ip(t, far.ns, "addr add 169.254.1.2/32 dev eth0", fmt.Sprintf("addr del %s/32 dev eth0", far.ip4), fmt.Sprintf("addr del %s/128 dev eth0", far.ip6),
		fmt.Sprintf("link add in0 type veth peer name eth0 netns %s", testutil.NetnsPath(machine)), "addr add 169.254.1.1/32 dev in0", "link set in0 addrgenmode none up",
		"addr add fe80::1/64 dev in0 nodad", fmt.Sprintf("route add %s/32 dev in0", far.ip4), fmt.Sprintf("-6 route add %s/128 dev in0", far.ip6))
	ip(t, machine, "link set lo up", "link set eth0 up", fmt.Sprintf("addr add %s/32 dev eth0", far.ip4), fmt.Sprintf("addr add %s/128 dev eth0 nodad", far.ip6),
		"route add 169.254.1.1 dev eth0", "route add default via 169.254.1.1 mtu 1450", "-6 route add default via fe80::1 dev eth0 mtu 1450")
	testutil.In(t, far.ns, "sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward; echo 1 > /proc/sys/net/ipv6/conf/all/forwarding")
	served := []netip.AddrPort{serve(t, machine, far.ip4), serve(t, machine, far.ip6)}
	for _, features := range []string{"", "tx-udp_tnl-segmentation off", "tso off", "gso off tx off"} {
		t.Run("sent on, "+features, func(t *testing.T) {
			if features != "" {
				testutil.In(t, far.ns, "sh", "-c", "ethtool -K in0 "+features)
			}
			for _, at := range served {
				stream(t, at)
			}
		})
	}
}
