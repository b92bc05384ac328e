// SPDX-License-Identifier: Apache-2.0

package netdev

import (
	"context"
	"errors"
	"net/netip"
	"os"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/lash-net/lash/internal/model"
	"github.com/lash-net/lash/internal/testutil"
)

var testNetwork = model.PodNetwork{
	Router4: netip.MustParseAddr("10.0.2.194"), Router6: netip.MustParseAddr("fd00::2c2"), MTU: 1500,
}

func testEndpoint() model.Endpoint {
	return model.Endpoint{
		ID: 1, ContainerID: "c0ffee", ContainerIfName: "eth0", IfName: "lxc0123456789ab",
		IPv4: netip.MustParseAddr("10.0.2.40"), IPv6: netip.MustParseAddr("fd00::228"),
	}
}

func newHost(t *testing.T) (*Host, *os.File) {
	t.Helper()
	ns := testutil.Netns(t)
	h, err := OpenHostAt(testutil.NetnsPath(ns))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { h.Close() })
	return h, ns
}

func attach(t *testing.T, h *Host, pod *os.File, ep model.Endpoint, network model.PodNetwork) model.Endpoint {
	t.Helper()
	ep, err := h.CreatePod(context.Background(), pod, ep, network)
	if err != nil {
		t.Fatal(err)
	}
	if err := h.StartPod(context.Background(), pod, ep, network); err != nil {
		t.Fatal(err)
	}
	return ep
}

var varying = []struct{ pattern, with string }{
	{`link/ether ([0-9a-f]{2}:){5}[0-9a-f]{2} brd`, "link/ether MAC brd"},
	{`<NO-CARRIER,`, "<"}, // of the side that has just got its peer, until the kernel says so
	{`inet6 fe80::[0-9a-f:]+/`, "inet6 fe80::LL/"},
	{`(?m)^[0-9]+: `, "N: "},
	{`@if[0-9]+:`, "@ifN:"},
	{` link-netns(id)? \S+`, " link-netnsid N"},
	{` proto kernel_ll`, ""},
}

// shape is the output of ip without what differs from run to run.
func shape(s string) string {
	for _, v := range varying {
		s = regexp.MustCompile(v.pattern).ReplaceAllString(s, v.with)
	}
	lines := strings.Split(strings.TrimSpace(s), "\n")
	for i := range lines {
		lines[i] = strings.TrimRight(lines[i], " ")
	}
	return strings.Join(lines, "\n")
}

func TestPodLooksLikeTheReference(t *testing.T) {
	h, ns := newHost(t)
	pod := testutil.Netns(t)
	ep := attach(t, h, pod, testEndpoint(), testNetwork)

	const wantAddr = `N: lo: <LOOPBACK,UP,LOWER_UP> mtu 65536 qdisc noqueue state UNKNOWN group default qlen 1000
    link/loopback 00:00:00:00:00:00 brd 00:00:00:00:00:00
    inet 127.0.0.1/8 scope host lo
       valid_lft forever preferred_lft forever
    inet6 ::1/128 scope host proto kernel_lo
       valid_lft forever preferred_lft forever
N: eth0@ifN: <BROADCAST,MULTICAST,UP,LOWER_UP> mtu 1500 qdisc noqueue state UP group default qlen 1000
    link/ether MAC brd ff:ff:ff:ff:ff:ff link-netnsid N
    inet 10.0.2.40/32 scope global eth0
       valid_lft forever preferred_lft forever
    inet6 fd00::228/128 scope global nodad
       valid_lft forever preferred_lft forever
    inet6 fe80::LL/64 scope link
       valid_lft forever preferred_lft forever`
	// The kernel makes the link-local address when its link event has been worked off, and lets it be used a moment later.
	for deadline := time.Now().Add(5 * time.Second); time.Now().Before(deadline); {
		if link := testutil.In(t, pod, "ip", "addr", "show", "dev", "eth0", "scope", "link"); strings.Contains(link, "fe80") && !strings.Contains(link, "tentative") {
			break
		}
	}
	got := strings.ReplaceAll(shape(testutil.In(t, pod, "ip", "addr")), "scope host \n", "scope host\n")
	want := wantAddr
	if !strings.Contains(got, "kernel_lo") { // older iproute2
		want = strings.ReplaceAll(want, " proto kernel_lo", "")
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("ip addr in the pod (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff("default via 10.0.2.194 dev eth0\n10.0.2.194 dev eth0 scope link", shape(testutil.In(t, pod, "ip", "route"))); diff != "" {
		t.Errorf("ip route in the pod (-want +got):\n%s", diff)
	}
	routes6 := shape(testutil.In(t, pod, "ip", "-6", "route"))
	for _, line := range []string{"default via fd00::2c2 dev eth0 metric 1024 pref medium", "fd00::2c2 dev eth0 metric 1024 pref medium"} {
		if !strings.Contains(routes6, line) {
			t.Errorf("ip -6 route in the pod lacks %q:\n%s", line, routes6)
		}
	}
	var host string
	for deadline := time.Now().Add(5 * time.Second); !strings.Contains(host, "state UP") && time.Now().Before(deadline); { // ditto
		host = shape(testutil.In(t, ns, "ip", "addr", "show", "dev", ep.IfName))
	}
	const wantHost = `N: lxc0123456789ab@ifN: <BROADCAST,MULTICAST,UP,LOWER_UP> mtu 1500 qdisc noqueue state UP group default qlen 1000
    link/ether MAC brd ff:ff:ff:ff:ff:ff link-netnsid N`
	if diff := cmp.Diff(wantHost, host); diff != "" {
		t.Errorf("ip addr of the host side (-want +got):\n%s", diff)
	}
	if err := h.CheckPod(context.Background(), pod, ep, testNetwork); err != nil {
		t.Errorf("check of an intact pod: %v", err)
	}
}

func TestRouteMTUIsOnDefaultRoutesOnlyWhenAsked(t *testing.T) {
	h, _ := newHost(t)
	pod := testutil.Netns(t)
	network := testNetwork
	network.RouteMTU = 1450
	ep := attach(t, h, pod, testEndpoint(), network)
	if diff := cmp.Diff("default via 10.0.2.194 dev eth0 mtu 1450\n10.0.2.194 dev eth0 scope link", shape(testutil.In(t, pod, "ip", "route"))); diff != "" {
		t.Errorf("ip route in the pod (-want +got):\n%s", diff)
	}
	if err := h.CheckPod(context.Background(), pod, ep, network); err != nil {
		t.Errorf("check: %v", err)
	}
}

// The seeds' pod in tunnel mode, the same after its node has passed to native routing, and back.
func TestPodGetsTheRouteMTUOfEachMode(t *testing.T) {
	h, _ := newHost(t)
	pod := testutil.Netns(t)
	network := testNetwork
	network.RouteMTU = 1450
	ep := attach(t, h, pod, testEndpoint(), network)
	for _, mtu := range []string{"1450", "1500", "1450"} {
		if mtu == "1500" {
			network.RouteMTU = 1500
		} else {
			network.RouteMTU = 1450
		}
		for range 2 {
			if err := h.RoutePod(context.Background(), pod, ep, network); err != nil {
				t.Fatal(err)
			}
		}
		want := "default via 10.0.2.194 dev eth0 mtu " + mtu + "\n10.0.2.194 dev eth0 scope link"
		if diff := cmp.Diff(want, shape(testutil.In(t, pod, "ip", "route"))); diff != "" {
			t.Errorf("(-want +got):\n%s", diff)
		}
		if got := testutil.In(t, pod, "ip", "-6", "route", "show", "default"); strings.Count(got, "default") != 1 || !strings.Contains(got, "via fd00::2c2 dev eth0 metric 1024 mtu "+mtu) {
			t.Errorf("IPv6: %s", got)
		}
		if err := h.CheckPod(context.Background(), pod, ep, network); err != nil {
			t.Error(err)
		}
	}
}

func TestPodWithIPv6SwitchedOffGetsItBack(t *testing.T) {
	h, _ := newHost(t)
	pod := testutil.Netns(t)
	testutil.In(t, pod, "sh", "-c", "echo 1 > /proc/sys/net/ipv6/conf/all/disable_ipv6; echo 1 > /proc/sys/net/ipv6/conf/default/disable_ipv6")
	ep := attach(t, h, pod, testEndpoint(), testNetwork)
	if err := h.CheckPod(context.Background(), pod, ep, testNetwork); err != nil {
		t.Errorf("check: %v", err)
	}
}

func TestCheckFindsWhatSomebodyChanged(t *testing.T) {
	for name, c := range map[string]struct{ inPod, onNode, want string }{
		"address":       {inPod: "ip addr del 10.0.2.40/32 dev eth0", want: "address 10.0.2.40/32 is missing"},
		"address 6":     {inPod: "ip addr del fd00::228/128 dev eth0", want: "address fd00::228/128 is missing"},
		"default route": {inPod: "ip route del default", want: "default via 10.0.2.194 dev eth0 is missing"},
		"router":        {inPod: "ip -6 route del fd00::2c2", want: "fd00::2c2 dev eth0 is missing"},
		"route MTU":     {inPod: "ip route replace default via 10.0.2.194 dev eth0 mtu 1400", want: "default via 10.0.2.194 dev eth0 is missing"},
		"down":          {inPod: "ip link set eth0 down", want: "device eth0 in the pod: down"},
		"host down":     {onNode: "ip link set lxc0123456789ab down", want: "device lxc0123456789ab on the node: down"},
		"MTU":           {onNode: "ip link set lxc0123456789ab mtu 1400", want: "MTU is 1400, was 1500"},
		"MAC":           {inPod: "ip link set eth0 address 02:00:00:00:00:01", want: "hardware address is 02:00:00:00:00:01"},
		"gone":          {onNode: "ip link del lxc0123456789ab", want: "device lxc0123456789ab on the node"},
		"renamed":       {inPod: "ip link set eth0 down; ip link set eth0 name net1", want: "device eth0 in the pod"},
	} {
		t.Run(name, func(t *testing.T) {
			h, ns := newHost(t)
			pod := testutil.Netns(t)
			ep := attach(t, h, pod, testEndpoint(), testNetwork)
			if c.inPod != "" {
				testutil.In(t, pod, "sh", "-c", c.inPod)
			} else {
				testutil.In(t, ns, "sh", "-c", c.onNode)
			}
			err := h.CheckPod(context.Background(), pod, ep, testNetwork)
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("check says %v, want %q", err, c.want)
			}
		})
	}
}

func TestFailedCreateLeavesNoDevice(t *testing.T) {
	for _, step := range []string{"create", "mark"} {
		t.Run(step, func(t *testing.T) {
			h, ns := newHost(t)
			pod := testutil.Netns(t)
			injected := errors.New("injected")
			h.faults = func(s string) error {
				if s == step {
					return injected
				}
				return nil
			}
			if _, err := h.CreatePod(context.Background(), pod, testEndpoint(), testNetwork); !errors.Is(err, injected) {
				t.Fatalf("create: %v", err)
			}
			for where, out := range map[string]string{"pod": testutil.In(t, pod, "ip", "-o", "link"), "node": testutil.In(t, ns, "ip", "-o", "link")} {
				if strings.Count(out, "\n") != 1 {
					t.Errorf("in the %s is more than lo:\n%s", where, out)
				}
			}
		})
	}
}

func TestCreateReplacesWhatAnEarlierAttemptLeft(t *testing.T) {
	h, _ := newHost(t)
	pod, again := testutil.Netns(t), testutil.Netns(t)
	first := attach(t, h, pod, testEndpoint(), testNetwork)
	second := attach(t, h, again, testEndpoint(), testNetwork)
	if first.Ifindex == second.Ifindex {
		t.Errorf("the same device")
	}
	if err := h.CheckPod(context.Background(), again, second, testNetwork); err != nil {
		t.Error(err)
	}
}

func TestCreateRefuses(t *testing.T) {
	h, ns := newHost(t)
	file, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	taken := testutil.Netns(t)
	testutil.In(t, taken, "ip", "link", "add", "eth0", "type", "veth", "peer", "name", "other")
	for name, c := range map[string]struct {
		netns *os.File
		want  string
	}{
		"no namespace":            {file, "not a network namespace"},
		"the namespace of a node": {ns, "of the node"},
		"a pod with eth0":         {taken, "has a device of the name eth0 already"},
	} {
		if _, err := h.CreatePod(context.Background(), c.netns, testEndpoint(), testNetwork); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q", name, err, c.want)
		}
	}
	if links, err := h.PodLinks(context.Background()); err != nil || len(links) != 0 {
		t.Errorf("left: %v %v", links, err)
	}
}

func TestDeleteLeavesDevicesOfOthers(t *testing.T) {
	h, ns := newHost(t)
	testutil.In(t, ns, "ip", "link", "add", "lxc0123456789ab", "type", "bridge")
	if err := h.DeletePod(context.Background(), "lxc0123456789ab"); err == nil {
		t.Error("a bridge was deleted")
	}
	if err := h.DeletePod(context.Background(), "lxcffffffffffff"); err != nil {
		t.Errorf("a device that is not there: %v", err)
	}
}

func TestPodLinksAreThoseWithTheAlias(t *testing.T) {
	h, ns := newHost(t)
	testutil.In(t, ns, "ip", "link", "add", "lxc000000000000", "type", "veth", "peer", "name", "peer0")
	ep := attach(t, h, testutil.Netns(t), testEndpoint(), testNetwork)
	links, err := h.PodLinks(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(map[string]int{ep.IfName: ep.Ifindex}, links); diff != "" {
		t.Error(diff)
	}
}

func TestDeleteAfterThePodIsGone(t *testing.T) {
	h, _ := newHost(t)
	pod := testutil.Netns(t)
	ep := attach(t, h, pod, testEndpoint(), testNetwork)
	pod.Close() // the kernel takes the device along, now or a little later
	if err := h.DeletePod(context.Background(), ep.IfName); err != nil {
		t.Error(err)
	}
	if links, err := h.PodLinks(context.Background()); err != nil || len(links) != 0 {
		t.Errorf("left: %v %v", links, err)
	}
}
