// SPDX-License-Identifier: Apache-2.0

package netdev

import (
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/lash-net/lash/internal/testutil"
)

var testTunnel = TunnelConfig{Protocol: VXLAN, Port: 8472, MTU: 1500}

// ensureTunnel makes the device as wanted and checks that doing it again changes nothing.
func ensureTunnel(t *testing.T, h *Host, config TunnelConfig) Tunnel {
	t.Helper()
	tunnel, err := h.EnsureTunnel(config)
	if errors.Is(err, unix.EOPNOTSUPP) {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	again, err := h.EnsureTunnel(config)
	if err != nil || len(again.Changes) != 0 || again.Ifindex != tunnel.Ifindex || again.Name != tunnel.Name {
		t.Errorf("the second call: %+v, %v; the first: %+v", again, err, tunnel)
	}
	if tunnel.Name == "" {
		return tunnel
	}
	if err := h.do(func() error {
		if on, err := Ethtool(tunnel.Name, unix.ETHTOOL_GGRO, 0); err != nil || on != 0 {
			return fmt.Errorf("GRO of %s is %d, %v", tunnel.Name, on, err)
		}
		return nil
	}); err != nil {
		t.Error(err)
	}
	return tunnel
}

// The reference's lines 29 to 31 of vxlan-nodeA-ip-addr-route.
func TestTunnelDeviceHasTheShapeOfTheReference(t *testing.T) {
	h, ns := newHost(t)
	ensureTunnel(t, h, testTunnel)
	const want = "N: lash_vxlan: <BROADCAST,MULTICAST,UP,LOWER_UP> mtu 1500 qdisc noqueue state UNKNOWN group default qlen 1000\n" +
		"    link/ether MAC brd ff:ff:ff:ff:ff:ff promiscuity 0 allmulti 0 minmtu 68 maxmtu 65535\n" +
		"    vxlan external id 0 srcport 0 0 dstport 8472 nolearning ttl auto ageing 300 udpcsum noudp6zerocsumtx noudp6zerocsumrx"
	got := strings.ReplaceAll(shape(testutil.In(t, ns, "ip", "-d", "addr", "show", "dev", VXLANDevice)), "  allmulti", " allmulti")
	if !strings.HasPrefix(got, want) {
		t.Errorf("(-want +got):\n%s", cmp.Diff(want, got))
	}
}

func TestGeneveDevice(t *testing.T) {
	h, ns := newHost(t)
	ensureTunnel(t, h, TunnelConfig{Protocol: Geneve, Port: 6081, MTU: 1500})
	if got := testutil.In(t, ns, "ip", "-d", "link", "show", "dev", GeneveDevice); !strings.Contains(got, "geneve external") || !strings.Contains(got, "dstport 6081") {
		t.Errorf("got %s", got)
	}
	ensureTunnel(t, h, testTunnel)
	if got := testutil.In(t, ns, "ip", "link"); strings.Contains(got, GeneveDevice) {
		t.Errorf("the device of the other protocol is there: %s", got)
	}
}

func TestTunnelDeviceIsMended(t *testing.T) {
	for name, change := range map[string]string{
		"down":         "ip link set lash_vxlan down",
		"MTU":          "ip link set lash_vxlan mtu 1280",
		"alias":        "ip link set lash_vxlan alias ''",
		"gone":         "ip link del lash_vxlan",
		"another port": "ip link del lash_vxlan; ip link add lash_vxlan type vxlan external dstport 4789",
		"not external": "ip link del lash_vxlan; ip link add lash_vxlan type vxlan id 7 dstport 8472",
	} {
		t.Run(name, func(t *testing.T) {
			h, ns := newHost(t)
			ensureTunnel(t, h, testTunnel)
			testutil.In(t, ns, "sh", "-ec", change)
			if mended, err := h.EnsureTunnel(testTunnel); err != nil || len(mended.Changes) == 0 {
				t.Fatalf("changes %q, %v", mended.Changes, err)
			}
			ensureTunnel(t, h, testTunnel)
			got := testutil.In(t, ns, "ip", "-d", "link", "show", "dev", VXLANDevice)
			for _, want := range []string{"UP", "mtu 1500", "vxlan external", "dstport 8472", "alias lash:tunnel"} {
				if !strings.Contains(got, want) {
					t.Errorf("%q is not in %s", want, got)
				}
			}
		})
	}
}

func TestTunnelDeviceThatIsNotWantedIsRemoved(t *testing.T) {
	h, ns := newHost(t)
	ensureTunnel(t, h, testTunnel)
	if got := ensureTunnel(t, h, TunnelConfig{}); got.Name != "" || got.Ifindex != 0 {
		t.Errorf("got %+v", got)
	}
	if got := testutil.In(t, ns, "ip", "link"); strings.Contains(got, VXLANDevice) {
		t.Errorf("it is there: %s", got)
	}
	ensureTunnel(t, h, testTunnel)
	if removed, err := h.Cleanup(CleanupConfig{}); err != nil || strings.Join(removed, " ") != "device lash_vxlan" {
		t.Errorf("cleanup removed %q, %v", removed, err)
	}
}

func TestTunnelDeviceOfSomebodyElseIsLeft(t *testing.T) {
	for name, change := range map[string]string{
		"kind":  "ip link add lash_vxlan type bridge",
		"alias": "ip link add lash_vxlan type vxlan external dstport 8472; ip link set lash_vxlan alias theirs",
	} {
		t.Run(name, func(t *testing.T) {
			h, ns := newHost(t)
			testutil.In(t, ns, "sh", "-ec", change)
			if _, err := h.EnsureTunnel(testTunnel); err == nil || !strings.Contains(err.Error(), "rename or remove it") {
				t.Errorf("error %v", err)
			}
			if _, err := h.EnsureTunnel(TunnelConfig{}); err != nil {
				t.Error(err)
			}
			if got := testutil.In(t, ns, "ip", "link"); !strings.Contains(got, VXLANDevice) {
				t.Errorf("it was removed: %s", got)
			}
		})
	}
}

func TestPortOfTheTunnelThatIsTakenIsExplained(t *testing.T) {
	for name, take := range map[string]func(*testing.T, *Host, *os.File){
		"device external0": func(t *testing.T, _ *Host, ns *os.File) {
			testutil.In(t, ns, "sh", "-ec", "ip link add external0 type vxlan external dstport 8472; ip link set external0 up")
		},
		"device flannel.1": func(t *testing.T, _ *Host, ns *os.File) {
			testutil.In(t, ns, "sh", "-ec", "ip link add flannel.1 type vxlan id 1 dstport 8472; ip link set flannel.1 up")
		},
		"somebody else": func(t *testing.T, h *Host, _ *os.File) {
			err := h.do(func() error {
				conn, err := net.ListenPacket("udp4", ":8472")
				if err == nil {
					t.Cleanup(func() { conn.Close() })
				}
				return err
			})
			if err != nil {
				t.Fatal(err)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			h, ns := newHost(t)
			take(t, h, ns)
			_, err := h.EnsureTunnel(testTunnel)
			if err == nil || !strings.Contains(err.Error(), "UDP port 8472 is taken by "+name) || !strings.Contains(err.Error(), "set tunnel-port to another") {
				t.Errorf("error %v", err)
			}
		})
	}
}
