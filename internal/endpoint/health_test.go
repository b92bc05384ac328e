// SPDX-License-Identifier: Apache-2.0

package endpoint_test

import (
	"context"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/lash-net/lash/internal/cni"
	"github.com/lash-net/lash/internal/datapath/netdev"
	"github.com/lash-net/lash/internal/endpoint"
	"github.com/lash-net/lash/internal/model"
	"github.com/lash-net/lash/internal/testutil"
)

func (n *node) addHealth(ns *os.File) model.Endpoint {
	n.t.Helper()
	ep, err := n.endpoints.AddHealth(context.Background(), ns)
	if err != nil {
		n.t.Fatal(err)
	}
	return ep
}

func TestHealthEndpoint(t *testing.T) {
	n := newNode(t)
	ns := testutil.Netns(t)
	ep := n.addHealth(ns)
	if ep.IfName != endpoint.HealthIfName || ep.Identity != model.IdentityHealth || ep.State != model.EndpointReady || len(ep.Addrs()) != 2 {
		t.Errorf("endpoint is %+v", ep)
	}
	if got := testutil.In(t, ns, "ip", "addr", "show", "eth0"); !strings.Contains(got, ep.IPv4.String()+"/32") || !strings.Contains(got, ep.IPv6.String()+"/128") {
		t.Errorf("device in the namespace:\n%s", got)
	}
	if got := testutil.In(t, n.ns, "ip", "-o", "link", "show", "lxc_health"); !strings.Contains(got, "UP") {
		t.Errorf("device on the node: %s", got)
	}
	if again := n.addHealth(ns); again.ID != ep.ID || again.Ifindex != ep.Ifindex {
		t.Errorf("it was made anew: %+v", again)
	}
	if err := n.endpoints.GC(t.Context(), []cni.Attachment{}); err != nil {
		t.Error(err)
	}
	// Somebody deletes the device: it is mended, its addresses stay.
	testutil.In(t, n.ns, "ip", "link", "delete", "lxc_health")
	mended := n.addHealth(ns)
	if mended.Ifindex == ep.Ifindex || !slices.Equal(mended.Addrs(), ep.Addrs()) {
		t.Errorf("was %+v, is %+v", ep, mended)
	}
	if err := n.endpoints.RemoveHealth(t.Context()); err != nil {
		t.Error(err)
	}
	if err := n.endpoints.RemoveHealth(t.Context()); err != nil {
		t.Error(err)
	}
	if left := n.left(); left != "" {
		t.Errorf("left: %s", left)
	}
}

// The namespace ends with its agent, sooner or later; a new agent makes the endpoint anew, with the addresses other nodes
// know it by, which no pod gets in between.
func TestHealthEndpointAfterRestart(t *testing.T) {
	for name, killed := range map[string]bool{"ended": false, "killed, its namespace still there": true} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t)
			n.add("c1", testutil.Netns(t))
			old, err := netdev.NewNetns()
			if err != nil {
				t.Fatal(err)
			}
			defer old.Close()
			before := n.addHealth(old)
			n.stop()
			if !killed {
				old.Close()
				n.waitUntilGone(endpoint.HealthIfName)
			}
			n.start()
			n.add("c2", testutil.Netns(t))
			after := n.addHealth(testutil.Netns(t))
			if !slices.Equal(before.Addrs(), after.Addrs()) || before.Ifindex == after.Ifindex {
				t.Errorf("before %+v, after %+v", before, after)
			}
			if err := n.endpoints.RemoveHealth(t.Context()); err != nil {
				t.Error(err)
			}
			for _, c := range []string{"c1", "c2"} {
				if res := n.call("DEL", c, nil); res.status != 0 {
					t.Error(res.text())
				}
			}
			if left := n.left(); left != "" {
				t.Errorf("left: %s", left)
			}
		})
	}
}

func TestHealthEndpointThatFailsLeavesNothing(t *testing.T) {
	n := newNode(t)
	ns := testutil.Netns(t)
	for _, step := range []string{"create", "attach", "sync", "start"} {
		n.faults.set(step)
		if ep, err := n.endpoints.AddHealth(t.Context(), ns); err == nil {
			t.Errorf("%s failed, and there is %+v", step, ep)
		}
		n.faults.set()
	}
	n.addHealth(ns)
	if err := n.endpoints.RemoveHealth(t.Context()); err != nil {
		t.Error(err)
	}
	if left := n.left(); left != "" {
		t.Errorf("left: %s", left)
	}
}

// waitUntilGone returns when the kernel has ended the namespace that a device's other end was in.
func (n *node) waitUntilGone(device string) {
	n.t.Helper()
	for end := time.Now().Add(10 * time.Second); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		links, err := n.devs.PodLinks(context.Background())
		if err != nil {
			n.t.Fatal(err)
		}
		if _, ok := links[device]; !ok {
			return
		}
	}
	n.t.Fatalf("%s is still there", device)
}
