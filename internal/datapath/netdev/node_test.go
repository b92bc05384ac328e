// SPDX-License-Identifier: Apache-2.0

package netdev

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"golang.org/x/sys/unix"

	"github.com/lash-net/lash/internal/model"
	"github.com/lash-net/lash/internal/testutil"
)

var testBase = BaseConfig{Router4: testNetwork.Router4, Router6: testNetwork.Router6, MTU: 1500}

// ensure makes the base as wanted and checks that doing it again changes nothing.
func ensure(t *testing.T, h *Host, config BaseConfig) Base {
	t.Helper()
	base, err := h.EnsureBase(config)
	if err != nil {
		t.Fatal(err)
	}
	again, err := h.EnsureBase(config)
	if err != nil {
		t.Fatal(err)
	}
	if len(again.Changes) != 0 {
		t.Errorf("the second call changed: %q", again.Changes)
	}
	base.Changes, again.Changes = nil, nil
	if diff := cmp.Diff(base, again); diff != "" {
		t.Errorf("the second call found something else:\n%s", diff)
	}
	return base
}

// uplink gives the node an eth0 with addresses and default routes, as nodes have.
func uplink(t *testing.T, ns *os.File) {
	t.Helper()
	testutil.In(t, ns, "sh", "-ec", `
		ip link set lo up
		ip link add eth0 type veth peer name far
		ip link set far up
		ip addr add 172.18.0.11/16 dev eth0
		ip addr add fc00::11/64 dev eth0 nodad
		ip link set eth0 up
		ip route add default via 172.18.0.1
		ip -6 route add default via fc00::1 dev eth0`)
}

func TestBaseDevicesHaveTheShapeOfTheReference(t *testing.T) {
	h, ns := newHost(t)
	ensure(t, h, testBase)
	const flags = "<BROADCAST,MULTICAST,NOARP,UP,LOWER_UP>"
	for dev, want := range map[string]string{
		HostDevice: "N: lash_host@lash_net: " + flags + " mtu 1500 qdisc noqueue state UP group default qlen 1000\n" +
			"    link/ether MAC brd ff:ff:ff:ff:ff:ff\n    inet 10.0.2.194/32 scope global lash_host\n",
		NetDevice: "N: lash_net@lash_host: " + flags + " mtu 1500 qdisc noqueue state UP group default qlen 1000\n" +
			"    link/ether MAC brd ff:ff:ff:ff:ff:ff",
	} {
		got := strings.Replace(shape(testutil.In(t, ns, "ip", "addr", "show", "dev", dev)), "state DOWN", "state UP", 1)
		if !strings.HasPrefix(got, want) {
			t.Errorf("%s (-want +got):\n%s", dev, cmp.Diff(want, got))
		}
	}
	if got := testutil.In(t, ns, "ip", "-6", "addr", "show", "dev", HostDevice, "scope", "global"); !strings.Contains(got, "fd00::2c2/128") || strings.Contains(got, "tentative") {
		t.Errorf("router of IPv6: %s", got)
	}
	for _, name := range []string{"net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding"} {
		if got := strings.TrimSpace(testutil.In(t, ns, "cat", "/proc/sys/"+name)); got != "1" {
			t.Errorf("%s is %s", name, got)
		}
	}
}

func TestBaseDevicesAreMendedInPlace(t *testing.T) {
	for name, change := range map[string]string{
		"down":             "ip link set lash_host down",
		"peer down":        "ip link set lash_net down",
		"MTU":              "ip link set lash_net mtu 1280",
		"ARP":              "ip link set lash_host arp on",
		"address gone":     "ip addr del 10.0.2.194/32 dev lash_host",
		"address 6 gone":   "ip addr del fd00::2c2/128 dev lash_host",
		"old router there": "ip addr add 10.0.9.1/32 dev lash_host",
		"alias":            "ip link set lash_host alias ''",
		"forwarding":       "echo 0 > /proc/sys/net/ipv4/ip_forward; echo 0 > /proc/sys/net/ipv6/conf/all/forwarding",
	} {
		t.Run(name, func(t *testing.T) {
			h, ns := newHost(t)
			before := ensure(t, h, testBase)
			testutil.In(t, ns, "sh", "-ec", change)
			mended, err := h.EnsureBase(testBase)
			if err != nil || len(mended.Changes) == 0 {
				t.Fatalf("changes %q, %v", mended.Changes, err)
			}
			after := ensure(t, h, testBase)
			if before.HostIfindex != after.HostIfindex {
				t.Error("the device was made anew")
			}
			if got := testutil.In(t, ns, "ip", "addr", "show", "dev", HostDevice); strings.Contains(got, "10.0.9.1") || !strings.Contains(got, "10.0.2.194/32") {
				t.Errorf("addresses:\n%s", got)
			}
		})
	}
}

func TestBaseDevicesThatAreNoPairAreMadeAnew(t *testing.T) {
	h, ns := newHost(t)
	other := testutil.Netns(t)
	ensure(t, h, testBase)
	testutil.In(t, ns, "ip", "link", "set", "lash_net", "netns", testutil.NetnsPath(other))
	ensure(t, h, testBase)
	testutil.In(t, ns, "ip", "link", "del", "lash_host")
	ensure(t, h, testBase)
}

func TestBaseDeviceOfSomebodyElseIsLeft(t *testing.T) {
	h, ns := newHost(t)
	testutil.In(t, ns, "ip", "link", "add", "lash_host", "type", "bridge")
	if _, err := h.EnsureBase(testBase); err == nil || !strings.Contains(err.Error(), "rename or remove it") {
		t.Errorf("error %v", err)
	}
}

func TestRouterAdvertisementsAreStillAccepted(t *testing.T) {
	h, ns := newHost(t)
	uplink(t, ns)
	ensure(t, h, testBase)
	if got := strings.TrimSpace(testutil.In(t, ns, "cat", "/proc/sys/net/ipv6/conf/eth0/accept_ra")); got != "2" {
		t.Errorf("accept_ra of eth0 is %s", got)
	}
}

func nodeRoutes() map[netip.Prefix]model.Route {
	p, a := netip.MustParsePrefix, netip.MustParseAddr
	return map[netip.Prefix]model.Route{
		p("10.0.2.194/32"): {Dev: HostDevice, Scope: model.ScopeLink},
		p("10.0.2.0/24"):   {Via: a("10.0.2.194"), Dev: HostDevice, Src: a("10.0.2.194"), Scope: model.ScopeGlobal},
		p("10.0.3.0/24"):   {Via: a("172.18.0.12"), Dev: "eth0", Scope: model.ScopeGlobal},
		p("10.0.4.0/24"):   {Via: a("172.18.0.13"), Dev: "eth0", MTU: 1450, Scope: model.ScopeGlobal},
		p("fd00::2c2/128"): {Dev: HostDevice, Scope: model.ScopeLink},
		p("fd00::200/120"): {Dev: HostDevice, Src: a("fd00::2c2"), Scope: model.ScopeLink},
		p("fd00::300/120"): {Via: a("fc00::12"), Dev: "eth0", Scope: model.ScopeGlobal},
	}
}

func serviceRoutes() map[netip.Prefix]model.Route {
	p, a := netip.MustParsePrefix, netip.MustParseAddr
	return map[netip.Prefix]model.Route{
		p("10.96.0.10/32"):   {Via: a("10.0.2.194"), Dev: HostDevice, Src: a("172.18.0.11"), MTU: 1450, Scope: model.ScopeGlobal},
		p("fd00:96::10/128"): {Dev: HostDevice, Src: a("fc00::11"), MTU: 1450, Scope: model.ScopeLink},
	}
}

func routedHost(t *testing.T) (*Host, *os.File, *Routes) {
	t.Helper()
	h, ns := newHost(t)
	uplink(t, ns)
	ensure(t, h, testBase)
	return h, ns, h.Routes()
}

func TestRoutesAreListedAsTheyWerePut(t *testing.T) {
	_, ns, routes := routedHost(t)
	ctx := context.Background()
	for range 2 { // the second time they are all there
		for dst, row := range nodeRoutes() {
			if err := routes.Put(ctx, dst, row); err != nil {
				t.Fatal(err)
			}
		}
		got, err := routes.List(ctx)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(nodeRoutes(), got, cmpopts.EquateComparable(netip.Addr{}, netip.Prefix{})); diff != "" {
			t.Errorf("(-put +listed):\n%s", diff)
		}
	}
	const want = `default via 172.18.0.1 dev eth0
10.0.2.0/24 via 10.0.2.194 dev lash_host proto 76 src 10.0.2.194
10.0.2.194 dev lash_host proto 76 scope link
10.0.3.0/24 via 172.18.0.12 dev eth0 proto 76
10.0.4.0/24 via 172.18.0.13 dev eth0 proto 76 mtu 1450
172.18.0.0/16 dev eth0 proto kernel scope link src 172.18.0.11`
	if diff := cmp.Diff(want, shape(testutil.In(t, ns, "ip", "route"))); diff != "" {
		t.Errorf("ip route (-want +got):\n%s", diff)
	}
	for dst := range nodeRoutes() {
		for range 2 {
			if err := routes.Delete(ctx, dst); err != nil {
				t.Errorf("delete %s: %v", dst, err)
			}
		}
	}
	if got, err := routes.List(ctx); err != nil || len(got) != 0 {
		t.Errorf("left %v %v", got, err)
	}
	if got := testutil.In(t, ns, "sh", "-c", "ip route; ip -6 route"); !strings.Contains(got, "default via 172.18.0.1") || !strings.Contains(got, "default via fc00::1") {
		t.Errorf("the node's own routes:\n%s", got)
	}
}

// Routes to services' addresses and the others do not see each other, and neither takes the other's place.
func TestServiceRoutesAreApart(t *testing.T) {
	h, ns, routes := routedHost(t)
	ctx := context.Background()
	services := h.ServiceRoutes()
	for dst, row := range nodeRoutes() {
		if err := routes.Put(ctx, dst, row); err != nil {
			t.Fatal(err)
		}
	}
	for range 2 {
		for dst, row := range serviceRoutes() {
			if err := services.Put(ctx, dst, row); err != nil {
				t.Fatal(err)
			}
			// The table's rule comes before all others, and before routes with a smaller metric.
			if err := routes.Put(ctx, dst, model.Route{Dev: "eth0", Scope: model.ScopeLink}); err != nil {
				t.Error(err)
			}
			if got := testutil.In(t, ns, "ip", "route", "get", dst.Addr().String()); !strings.Contains(got, "dev lash_host") {
				t.Errorf("%s goes by %s", dst, got)
			}
			if err := routes.Delete(ctx, dst); err != nil {
				t.Error(err)
			}
			// What is the node's own is its own, whoever was first.
			own := "ip addr %s " + dst.String() + " dev eth0"
			if dst.Addr().Is6() {
				own += " nodad"
			}
			testutil.In(t, ns, "sh", "-ec", fmt.Sprintf(own, "add"))
			got := ""
			for deadline := time.Now().Add(5 * time.Second); !strings.HasPrefix(got, "local") && time.Now().Before(deadline); { // the kernel adds IPv6's route a moment later
				got = testutil.In(t, ns, "ip", "route", "get", dst.Addr().String())
			}
			if !strings.HasPrefix(got, "local") {
				t.Errorf("the node's own address %s goes by %s", dst, got)
			}
			if err := services.Put(ctx, dst, row); err != nil {
				t.Error(err)
			}
			testutil.In(t, ns, "sh", "-ec", fmt.Sprintf(own, "del"))
		}
		for _, c := range []struct {
			of   *Routes
			want map[netip.Prefix]model.Route
		}{{routes, nodeRoutes()}, {services, serviceRoutes()}} {
			got, err := c.of.List(ctx)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(c.want, got, cmpopts.EquateComparable(netip.Addr{}, netip.Prefix{})); diff != "" {
				t.Errorf("(-want +listed):\n%s", diff)
			}
		}
	}
	for dst, row := range serviceRoutes() {
		row.MTU, row.Src = 1400, testBase.Router4
		if dst.Addr().Is6() {
			row.Src = testBase.Router6
		}
		if err := services.Put(ctx, dst, row); err != nil {
			t.Fatal(err)
		}
		if got, err := services.List(ctx); err != nil || got[dst] != row {
			t.Errorf("listed %v %v, want %v", got[dst], err, row)
		}
		for range 2 {
			if err := services.Delete(ctx, dst); err != nil {
				t.Errorf("delete %s: %v", dst, err)
			}
		}
	}
	if got, err := services.List(ctx); err != nil || len(got) != 0 {
		t.Errorf("left %v %v", got, err)
	}
}

// Ten thousand services' routes are there in seconds.
func BenchmarkServiceRoutes(b *testing.B) {
	testutil.NeedRoot(b)
	ns := testutil.Netns(b)
	h, err := OpenHostAt(testutil.NetnsPath(ns))
	if err != nil {
		b.Fatal(err)
	}
	defer h.Close()
	if _, err := h.EnsureBase(testBase); err != nil {
		b.Fatal(err)
	}
	testutil.In(b, ns, "ip", "route", "add", "10.0.2.194", "dev", HostDevice)
	routes, ctx := h.ServiceRoutes(), context.Background()
	router4, router6 := netip.MustParseAddr("10.0.2.194"), netip.MustParseAddr("fd00::2c2")
	dst4, dst6 := netip.MustParseAddr("10.96.0.1"), netip.MustParseAddr("fd00:96::1")
	for b.Loop() {
		err := routes.Put(ctx, netip.PrefixFrom(dst4, 32), model.Route{Via: router4, Dev: HostDevice, Src: router4, Scope: model.ScopeGlobal})
		if err == nil {
			err = routes.Put(ctx, netip.PrefixFrom(dst6, 128), model.Route{Dev: HostDevice, Src: router6, Scope: model.ScopeLink})
		}
		if err != nil {
			b.Fatal(err)
		}
		dst4, dst6 = dst4.Next(), dst6.Next()
	}
	began := time.Now()
	rows, err := routes.List(ctx)
	if err != nil {
		b.Fatal(err)
	}
	b.ReportMetric(float64(time.Since(began).Microseconds())/float64(len(rows)), "us/listed")
	began = time.Now()
	if rows, err = h.Routes().List(ctx); err != nil || len(rows) != 0 {
		b.Fatal(rows, err)
	}
	b.ReportMetric(float64(time.Since(began).Microseconds()), "us/others-listed")
}

func TestRouteIsReplaced(t *testing.T) {
	_, _, routes := routedHost(t)
	ctx := context.Background()
	for _, c := range []struct{ dst, first, second string }{
		{"10.0.3.0/24", "172.18.0.12", "172.18.0.99"}, {"fd00::300/120", "fc00::12", "fc00::99"},
	} {
		dst := netip.MustParsePrefix(c.dst)
		for _, via := range []string{c.first, c.second} {
			row := model.Route{Via: netip.MustParseAddr(via), Dev: "eth0", Scope: model.ScopeGlobal}
			if err := routes.Put(ctx, dst, row); err != nil {
				t.Fatal(err)
			}
			if got, err := routes.List(ctx); err != nil || got[dst] != row {
				t.Errorf("listed %v %v, want %v", got, err, row)
			}
		}
	}
}

func TestRoutesOfOthersAreNeitherListedNorReplacedNorDeleted(t *testing.T) {
	_, ns, routes := routedHost(t)
	ctx := context.Background()
	testutil.In(t, ns, "sh", "-ec", "ip route add 10.0.3.0/24 via 172.18.0.50 proto bird; ip -6 route add fd00::300/120 via fc00::50 proto bird")
	for dst, row := range nodeRoutes() {
		if row.Dev != "eth0" || dst.Addr().String() == "10.0.4.0" {
			continue
		}
		if err := routes.Put(ctx, dst, row); err == nil || !strings.Contains(err.Error(), "left alone") {
			t.Errorf("put %s: %v", dst, err)
		}
		if err := routes.Delete(ctx, dst); err != nil {
			t.Errorf("delete %s: %v", dst, err)
		}
	}
	if got, err := routes.List(ctx); err != nil || len(got) != 0 {
		t.Errorf("listed %v %v", got, err)
	}
	if got := testutil.In(t, ns, "sh", "-c", "ip route; ip -6 route"); strings.Count(got, "proto bird") != 2 {
		t.Errorf("routes:\n%s", got)
	}
}

func TestUnreachableGatewayIsExplained(t *testing.T) {
	_, _, routes := routedHost(t)
	for dst, via := range map[string]string{"10.0.7.0/24": "192.0.2.1", "fd00::700/120": "2001:db8::1"} {
		err := routes.Put(context.Background(), netip.MustParsePrefix(dst), model.Route{Via: netip.MustParseAddr(via), Dev: "eth0", Scope: model.ScopeGlobal})
		if err == nil || !strings.Contains(err.Error(), "layer 2") {
			t.Errorf("%s: %v", dst, err)
		}
	}
}

func TestDetectExplainsEachDevice(t *testing.T) {
	h, ns := newHost(t)
	uplink(t, ns)
	ensure(t, h, testBase)
	attach(t, h, testutil.Netns(t), testEndpoint(), testNetwork)
	testutil.In(t, ns, "sh", "-ec", `
		ip link add br0 type bridge; ip link set far master br0
		ip link add eth1 type veth peer name far1; ip addr add 192.168.7.1/24 dev eth1; ip link set eth1 mtu 1400 up; ip link set far1 up
		ip link add docker0 type bridge`)
	node := []netip.Addr{netip.MustParseAddr("172.18.0.11"), netip.MustParseAddr("fc00::11")}

	found, err := h.Detect(DetectConfig{NodeAddrs: node})
	if err != nil {
		t.Fatal(err)
	}
	if len(found.Devices) != 1 || found.Devices[0].Name != "eth0" || !found.Devices[0].DirectRouting ||
		found.Devices[0].IPv4 != node[0] || found.Devices[0].IPv6 != node[1] || found.Devices[0].Reason != "node address 172.18.0.11" {
		t.Errorf("devices %+v", found.Devices)
	}
	if found.MTU != 1500 || found.MTUReason != "1500 from eth0 (node address 172.18.0.11)" {
		t.Errorf("MTU %d: %s", found.MTU, found.MTUReason)
	}
	reasons := map[string]string{}
	for _, s := range found.Skipped {
		reasons[s.Name] = s.Reason
	}
	want := map[string]string{
		"lo": "the loopback device", "lash_host": "a device of Lash", "lash_net": "a device of Lash",
		"lxc0123456789ab": "the host side of a pod's device", "far": "a port of a bridge", "docker0": "a bridge of Docker",
		"br0": "neither a node address nor a default route", "eth1": "neither a node address nor a default route", "far1": "neither a node address nor a default route",
	}
	if diff := cmp.Diff(want, reasons); diff != "" {
		t.Errorf("skipped (-want +got):\n%s", diff)
	}
	for name, c := range map[string]struct {
		config  DetectConfig
		devices string
		direct  string
		mtu     string
	}{
		"pattern":       {DetectConfig{NodeAddrs: node, Devices: []string{"eth+"}}, "eth0:matches eth+ of devices eth1:matches eth+ of devices", "eth0", "1500 from eth0 (node address 172.18.0.11)"},
		"glob":          {DetectConfig{NodeAddrs: node, Devices: []string{"et*1"}}, "eth0:node address 172.18.0.11 eth1:matches et*1 of devices", "eth0", "1500 from eth0 (node address 172.18.0.11)"},
		"by name":       {DetectConfig{NodeAddrs: node, Devices: []string{"docker0", "far"}}, "docker0:listed in devices eth0:node address 172.18.0.11 far:listed in devices", "eth0", "1500 from eth0 (node address 172.18.0.11)"},
		"never ours":    {DetectConfig{NodeAddrs: node, Devices: []string{"lash_host", "lxc+", "lo"}}, "eth0:node address 172.18.0.11", "eth0", "1500 from eth0 (node address 172.18.0.11)"},
		"direct device": {DetectConfig{NodeAddrs: node, DirectRouting: "eth1"}, "eth0:node address 172.18.0.11 eth1:direct-routing-device", "eth1", "1500 from eth0 (node address 172.18.0.11)"},
		"address on lo": {DetectConfig{NodeAddrs: []netip.Addr{netip.MustParseAddr("192.0.2.1")}}, "eth0:default route", "eth0", "1500 from eth0 (default route)"},
		"smallest":      {DetectConfig{NodeAddrs: append([]netip.Addr{netip.MustParseAddr("192.168.7.1")}, node...)}, "eth0:node address 172.18.0.11 eth1:node address 192.168.7.1", "eth1", "1400 from eth1 (node address 192.168.7.1)"},
		"MTU by hand":   {DetectConfig{NodeAddrs: node, MTU: 1300}, "eth0:node address 172.18.0.11", "eth0", "1300 from the configuration (mtu)"},
	} {
		found, err := h.Detect(c.config)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		var devices []string
		for _, d := range found.Devices {
			devices = append(devices, d.Name+":"+d.Reason)
		}
		direct, _ := found.DirectRouting()
		if got := strings.Join(devices, " "); got != c.devices || direct.Name != c.direct || found.MTUReason != c.mtu {
			t.Errorf("%s: devices %q, direct routing %q, MTU %q", name, got, direct.Name, found.MTUReason)
		}
	}
	if _, err := h.Detect(DetectConfig{NodeAddrs: node, DirectRouting: "eth9"}); err == nil || !strings.Contains(err.Error(), "eth9") {
		t.Errorf("unknown direct-routing-device: %v", err)
	}
	found, err = h.Detect(DetectConfig{NodeAddrs: node, Devices: []string{"wlan+"}})
	if err != nil || found.Skipped[len(found.Skipped)-1] != (Skipped{"wlan+", "no device matches this entry of devices"}) {
		t.Errorf("pattern without a device: %+v %v", found.Skipped, err)
	}
}

func TestMasqueradeAddressIsTheNodesElseALastingOne(t *testing.T) {
	h, ns := newHost(t)
	uplink(t, ns)
	testutil.In(t, ns, "sh", "-ec", `
		ip addr add 172.18.0.12/16 dev eth0
		ip link add eth1 type veth peer name far1
		ip addr add 169.254.1.1/16 dev eth1 scope link
		ip addr add 192.168.7.1/24 dev eth1
		ip addr add 192.168.7.2/24 dev eth1
		ip addr add fc01::1/64 dev eth1 nodad preferred_lft 0
		ip addr add fc01::2/64 dev eth1 nodad
		ip link set eth1 up`)
	found, err := h.Detect(DetectConfig{NodeAddrs: []netip.Addr{netip.MustParseAddr("172.18.0.12")}, Devices: []string{"eth+"}})
	if err != nil {
		t.Fatal(err)
	}
	got := ""
	for _, d := range found.Devices {
		got += fmt.Sprintf("%s %s %s\n", d.Name, d.IPv4, d.IPv6)
	}
	if want := "eth0 172.18.0.12 fc00::11\neth1 192.168.7.1 fc01::2\n"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
}

// next waits for a change, skipping those without the wanted kinds: a command may cause several.
func next(t *testing.T, w *Watcher, wanted func(Change) bool) {
	t.Helper()
	timeout := time.After(10 * time.Second)
	for {
		select {
		case c := <-w.Changes():
			if wanted(c) {
				return
			}
		case <-timeout:
			t.Fatal("no such change was reported")
		}
	}
}

func TestWatcherReportsChangesOfTheNodeButNotPods(t *testing.T) {
	h, ns := newHost(t)
	// The address that the kernel itself gives eth0 would be told a second time when it has proved to be unique, a second or two later.
	testutil.In(t, ns, "sh", "-c", "echo 0 > /proc/sys/net/ipv6/conf/default/accept_dad")
	uplink(t, ns)
	w, err := h.Watch()
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- w.Run(ctx) }()

	for _, c := range []struct {
		command string
		wanted  func(Change) bool
	}{
		{"ip link set eth0 mtu 1400", func(c Change) bool { return c.Links }},
		{"ip addr add 10.9.9.9/24 dev eth0", func(c Change) bool { return c.Addrs }},
		{"ip route add 192.0.2.0/24 via 172.18.0.1", func(c Change) bool { return c.Routes }},
		{"ip -6 route add 2001:db8::/64 via fc00::1", func(c Change) bool { return c.Routes }},
		{"ip neigh add 172.18.0.77 lladdr 02:00:00:00:00:77 dev eth0 nud reachable", func(c Change) bool { return c.Neighbors }},
		{"ip neigh replace 172.18.0.77 lladdr 02:00:00:00:00:78 dev eth0 nud reachable", func(c Change) bool { return c.Neighbors }},
		{"ip neigh del 172.18.0.77 dev eth0", func(c Change) bool { return c.Neighbors }},
		// Those to services' addresses are news when they go, and no news to anybody else.
		{"ip route add 10.96.0.10 dev eth0 proto 77 table local; ip route del 10.96.0.10 dev eth0 proto 77 table local", func(c Change) bool { return c == Change{ServiceRoutes: true} }},
	} {
		testutil.In(t, ns, "sh", "-ec", c.command)
		next(t, w, c.wanted)
	}
	// Everything up to a mark of our own must be silent about pods. Link events of the mark end the wait.
	for drained := false; !drained; {
		select {
		case <-w.Changes():
		case <-time.After(3 * latest):
			drained = true
		}
	}
	for i := range 5 {
		ep := testEndpoint()
		ep.IfName = fmt.Sprintf("lxc%012x", i)
		attach(t, h, testutil.Netns(t), ep, testNetwork)
	}
	testutil.In(t, ns, "ip", "neigh", "add", "172.18.0.78", "lladdr", "02:00:00:00:00:78", "dev", "eth0", "nud", "stale")
	select {
	case c := <-w.Changes():
		if c != (Change{Neighbors: true}) {
			t.Errorf("pods were reported: %+v", c)
		}
	case <-time.After(10 * time.Second):
		t.Error("the mark was not reported")
	}
	cancel()
	if err := <-ended; err != nil {
		t.Errorf("run: %v", err)
	}
}

func TestWatcherSaysThatMessagesWereLost(t *testing.T) {
	h, ns := newHost(t)
	uplink(t, ns)
	w, err := h.Watch()
	if err != nil {
		t.Fatal(err)
	}
	// Nobody reads yet. A small buffer overflows at once.
	raw, err := w.socket.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	raw.Control(func(fd uintptr) { shrinkReceiveBuffer(t, int(fd)) })
	testutil.In(t, ns, "sh", "-ec", "for i in $(seq 200); do echo addr add 10.77.0.$i/32 dev eth0; done | ip -batch -")
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	go w.Run(ctx)
	next(t, w, func(c Change) bool { return c.Lost })
}

func TestCleanupRemovesAllOfOursAndNothingElse(t *testing.T) {
	h, ns, routes := routedHost(t)
	before := testutil.In(t, ns, "sh", "-c", "ip -o link show eth0; ip route show dev eth0; ip -6 route show dev eth0 proto boot")
	for dst, row := range nodeRoutes() {
		if err := routes.Put(context.Background(), dst, row); err != nil {
			t.Fatal(err)
		}
	}
	for dst, row := range serviceRoutes() {
		if err := h.ServiceRoutes().Put(context.Background(), dst, row); err != nil {
			t.Fatal(err)
		}
	}
	attach(t, h, testutil.Netns(t), testEndpoint(), testNetwork)
	testutil.In(t, ns, "ip", "link", "add", "lxc000000000000", "type", "veth", "peer", "name", "theirs")
	dir := t.TempDir()
	ours, theirs, bpf := filepath.Join(dir, "run/lash"), filepath.Join(dir, "run/other"), filepath.Join(dir, "bpf")
	for _, d := range []string{ours + "/state/endpoints", theirs, bpf + "/lash/maps", bpf + "/theirs"} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	config := CleanupConfig{BPFRoot: bpf, Paths: []string{ours}, Programs: []string{"from_netdev"}}
	removed, err := h.Cleanup(config)
	if err != nil {
		t.Fatal(err)
	}
	if len(removed) != len(nodeRoutes())+len(serviceRoutes())+1+1+2 { // routes, the pair, the pod's, two directories
		t.Errorf("removed %q", removed)
	}
	after := testutil.In(t, ns, "sh", "-c", "ip -o link show eth0; ip route show dev eth0; ip -6 route show dev eth0 proto boot")
	if diff := cmp.Diff(before, after); diff != "" {
		t.Errorf("what is not ours has changed:\n%s", diff)
	}
	left := testutil.In(t, ns, "sh", "-c", "ip -o link; ip route show proto 76; ip -6 route show proto 76; ip route show table local proto 77; ip -6 route show table local proto 77")
	if strings.Contains(left, "lash") || strings.Contains(left, "lxc0123456789ab") || strings.Contains(left, "via") || !strings.Contains(left, "lxc000000000000") {
		t.Errorf("left:\n%s", left)
	}
	for path, want := range map[string]bool{ours: false, bpf + "/lash": false, theirs: true, bpf + "/theirs": true} {
		if _, err := os.Stat(path); (err == nil) != want {
			t.Errorf("%s: exists is %v", path, err == nil)
		}
	}
	if again, err := h.Cleanup(config); err != nil || len(again) != 0 {
		t.Errorf("again: %q %v", again, err)
	}
	if _, err := h.Cleanup(CleanupConfig{Paths: []string{"/"}}); err == nil {
		t.Error("a path of no element was accepted")
	}
}

func shrinkReceiveBuffer(t *testing.T, fd int) {
	t.Helper()
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, 1); err != nil {
		t.Fatal(err)
	}
}
