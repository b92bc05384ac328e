// SPDX-License-Identifier: Apache-2.0

package operator

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"

	v2 "github.com/lash-net/lash/api/v2"
	"github.com/lash-net/lash/internal/config"
)

// cluster is an API server of two kinds, and a cache of it that is as old as the last sync.
type cluster struct {
	version  int
	nodes    map[string]*corev1.Node
	stored   map[string]*v2.CiliumNode
	cached   []*v2.CiliumNode
	services []netip.Prefix
	writes   []string
	fail     error
}

func newCluster() *cluster {
	return &cluster{nodes: map[string]*corev1.Node{}, stored: map[string]*v2.CiliumNode{}}
}

func (c *cluster) addNode(name, ip string) {
	c.nodes[name] = &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name},
		Status: corev1.NodeStatus{Addresses: []corev1.NodeAddress{{Type: corev1.NodeInternalIP, Address: ip}}}}
}

func (c *cluster) addCiliumNode(name string, created int, podCIDRs ...string) {
	c.version++
	c.stored[name] = &v2.CiliumNode{
		ObjectMeta: metav1.ObjectMeta{Name: name, UID: types.UID("uid-" + name), ResourceVersion: strconv.Itoa(c.version), CreationTimestamp: metav1.Unix(int64(created), 0)},
		Spec:       v2.NodeSpec{IPAM: v2.NodeIPAM{PodCIDRs: podCIDRs}},
	}
}

func (c *cluster) sync() {
	c.cached = nil
	for _, n := range c.stored {
		c.cached = append(c.cached, n.DeepCopy())
	}
}

func (c *cluster) Nodes() []*corev1.Node {
	var out []*corev1.Node
	for _, n := range c.nodes {
		out = append(out, n)
	}
	return out
}

func (c *cluster) CiliumNodes() []*v2.CiliumNode { return slices.Clone(c.cached) }
func (c *cluster) ServiceCIDRs() []netip.Prefix  { return c.services }

func (c *cluster) NodeIsGone(_ context.Context, name string) (bool, error) {
	return c.nodes[name] == nil, c.fail
}

func (c *cluster) Patch(_ context.Context, name string, _ types.PatchType, data []byte, sub ...string) (*v2.CiliumNode, error) {
	if c.fail != nil {
		return nil, c.fail
	}
	n := c.stored[name]
	var patch v2.CiliumNode
	if err := json.Unmarshal(data, &patch); err != nil {
		return nil, err
	}
	if rv := patch.ResourceVersion; rv != "" && rv != n.ResourceVersion {
		return nil, apierrors.NewConflict(schema.GroupResource{}, name, errors.New("changed"))
	}
	c.version++
	n.ResourceVersion = strconv.Itoa(c.version)
	if slices.Contains(sub, "status") {
		n.Status.IPAM.OperatorStatus = patch.Status.IPAM.OperatorStatus
	} else {
		n.Spec.IPAM.PodCIDRs = patch.Spec.IPAM.PodCIDRs
	}
	c.writes = append(c.writes, name)
	return n.DeepCopy(), nil
}

func (c *cluster) Delete(_ context.Context, name string, uid types.UID, _ string) error {
	if c.stored[name].UID != uid {
		return apierrors.NewConflict(schema.GroupResource{}, name, errors.New("another uid"))
	}
	delete(c.stored, name)
	c.writes = append(c.writes, "-"+name)
	return nil
}

func testPass(t *testing.T, c *cluster, settings map[string]string) *nodesPass {
	t.Helper()
	conf, err := config.FromMap("test", settings)
	if err != nil {
		t.Fatal(err)
	}
	p := newNodesPass(slog.New(slog.DiscardHandler), conf, c, c)
	now := time.Unix(1000, 0)
	p.now = func() time.Time { now = now.Add(time.Second); return now }
	return p
}

func TestNodesGetPodCIDRsOnce(t *testing.T) {
	c := newCluster()
	c.addNode("a", "192.0.2.1")
	c.addNode("b", "10.0.1.9") // lies in the pool
	c.addCiliumNode("a", 1)
	c.addCiliumNode("b", 2)
	c.services = []netip.Prefix{netip.MustParsePrefix("10.0.2.0/24")}
	c.sync()
	p := testPass(t, c, map[string]string{"enable-ipv6": "true"})
	if _, err := p.run(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := fmt.Sprint(c.stored["a"].Spec.IPAM.PodCIDRs, c.stored["b"].Spec.IPAM.PodCIDRs); got != "[10.0.0.0/24 fd00::/120] [10.0.3.0/24 fd00::100/120]" {
		t.Errorf("assigned %s", got)
	}
	c.sync()
	c.writes = nil
	if _, err := p.run(t.Context()); err != nil || len(c.writes) != 0 {
		t.Errorf("second pass wrote %v (%v)", c.writes, err)
	}
}

// TestOldCacheDoesNotGiveACIDRAway: an older node appears while the cache still lacks what was just written.
func TestOldCacheDoesNotGiveACIDRAway(t *testing.T) {
	c := newCluster()
	c.addNode("young", "192.0.2.1")
	c.addNode("old", "192.0.2.2")
	c.addCiliumNode("young", 2)
	c.sync()
	p := testPass(t, c, nil)
	if _, err := p.run(t.Context()); err != nil {
		t.Fatal(err)
	}
	stale := c.cached
	c.addCiliumNode("old", 1)
	c.cached = append(stale, c.stored["old"].DeepCopy())
	if _, err := p.run(t.Context()); err != nil {
		t.Fatal(err)
	}
	if a, b := c.stored["young"].Spec.IPAM.PodCIDRs, c.stored["old"].Spec.IPAM.PodCIDRs; len(a) != 1 || len(b) != 1 || a[0] == b[0] {
		t.Errorf("young has %v, old has %v", a, b)
	}
}

func TestExhaustionIsReportedAndCleared(t *testing.T) {
	c := newCluster()
	for i, n := range []string{"a", "b"} {
		c.addNode(n, "192.0.2."+strconv.Itoa(i+1))
		c.addCiliumNode(n, i)
	}
	c.sync()
	p := testPass(t, c, map[string]string{"cluster-pool-ipv4-cidr": "10.0.0.0/24", "nodes-gc-interval": "10s"})
	if _, err := p.run(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := c.stored["b"].Status.IPAM.OperatorStatus.Error; !strings.Contains(got, "pool 10.0.0.0/24: add a CIDR to cluster-pool-ipv4-cidr") {
		t.Errorf("error of b is %q", got)
	}
	delete(c.nodes, "a")
	for range 20 {
		c.sync()
		if _, err := p.run(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	if c.stored["a"] != nil {
		t.Error("a is still there")
	}
	if b := c.stored["b"]; b.Status.IPAM.OperatorStatus.Error != "" || !slices.Equal(b.Spec.IPAM.PodCIDRs, []string{"10.0.0.0/24"}) {
		t.Errorf("b is %+v", b)
	}
}

func TestCiliumNodeOutlivesItsNodeByTheGrace(t *testing.T) {
	c := newCluster()
	c.addCiliumNode("a", 1, "10.0.0.0/24")
	c.sync()
	p := testPass(t, c, map[string]string{"nodes-gc-interval": "1m"})
	again, err := p.run(t.Context())
	if err != nil || c.stored["a"] == nil || again <= 0 || again > time.Minute {
		t.Fatalf("again in %v, %v, a is %v", again, err, c.stored["a"])
	}
	c.addNode("a", "192.0.2.1") // comes back: its time starts anew when it leaves again
	if again, _ := p.run(t.Context()); again != 0 || len(p.missing) != 0 {
		t.Errorf("again in %v, missing %v", again, p.missing)
	}
	delete(c.nodes, "a")
	p.now = func() time.Time { return time.Unix(5000, 0) }
	p.run(t.Context())
	p.now = func() time.Time { return time.Unix(5061, 0) }
	c.fail = errors.New("the API server is away")
	if _, err := p.run(t.Context()); err == nil || c.stored["a"] == nil {
		t.Errorf("deleted without asking (%v)", err)
	}
	c.fail = nil
	if _, err := p.run(t.Context()); err != nil || c.stored["a"] != nil {
		t.Errorf("not deleted after the grace (%v)", err)
	}
}

// TestMalformedCiliumNodesAreNamedAndHoldNobodyBack: the error says field and remedy, other nodes get their CIDRs.
func TestMalformedCiliumNodesAreNamedAndHoldNobodyBack(t *testing.T) {
	for _, tt := range []struct {
		podCIDRs []string
		want     string
	}{
		{[]string{"10.0.0.0"}, `spec.ipam.podCIDRs[0]="10.0.0.0" is not a CIDR: remove it`},
		{[]string{"10.0.0.5/24"}, `spec.ipam.podCIDRs[0]="10.0.0.5/24" is not a CIDR: remove it`},
		{[]string{"10.0.0.0/24", ""}, `spec.ipam.podCIDRs[1]="" is not a CIDR: remove it`},
		{[]string{"fd00::/129"}, `spec.ipam.podCIDRs[0]="fd00::/129"`},
		{[]string{"10.7.0.0/24"}, `spec.ipam.podCIDRs[0]=10.7.0.0/24 overlaps a pod CIDR of node first: drain this node and delete its CiliumNode`},
		{[]string{"10.7.0.128/25"}, `overlaps a pod CIDR of node first`},
		{[]string{"10.0.0.0/12"}, `overlaps a pod CIDR of node first`},
	} {
		c := newCluster()
		for i, n := range []string{"first", "bad", "good"} {
			c.addNode(n, "192.0.2."+strconv.Itoa(i+1))
		}
		c.addCiliumNode("first", 1, "10.7.0.0/24")
		c.addCiliumNode("bad", 2, tt.podCIDRs...)
		c.addCiliumNode("good", 3)
		c.sync()
		p := testPass(t, c, map[string]string{"cluster-pool-ipv4-cidr": "10.200.0.0/16"})
		if _, err := p.run(t.Context()); err != nil {
			t.Fatal(err)
		}
		if got := c.stored["bad"].Status.IPAM.OperatorStatus.Error; !strings.Contains(got, tt.want) {
			t.Errorf("%q: error %q, want %q", tt.podCIDRs, got, tt.want)
		}
		if !slices.Equal(c.stored["bad"].Spec.IPAM.PodCIDRs, tt.podCIDRs) {
			t.Errorf("%q: changed to %q", tt.podCIDRs, c.stored["bad"].Spec.IPAM.PodCIDRs)
		}
		if len(c.stored["good"].Spec.IPAM.PodCIDRs) != 1 {
			t.Errorf("%q: the other node got %q", tt.podCIDRs, c.stored["good"].Spec.IPAM.PodCIDRs)
		}
	}
}

func TestKubernetesModeAssignsNothing(t *testing.T) {
	c := newCluster()
	c.addNode("a", "192.0.2.1")
	c.addCiliumNode("a", 1)
	c.sync()
	if _, err := testPass(t, c, map[string]string{"ipam": "kubernetes"}).run(t.Context()); err != nil || len(c.writes) != 0 {
		t.Errorf("wrote %v (%v)", c.writes, err)
	}
}
