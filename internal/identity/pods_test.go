// SPDX-License-Identifier: Apache-2.0

package identity

import (
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"

	"github.com/cilium/statedb"
	"github.com/google/go-cmp/cmp"

	"github.com/lash-net/lash/internal/model"
	"github.com/lash-net/lash/internal/state"
)

func newTables(t *testing.T) *state.Tables {
	t.Helper()
	tables, err := state.New()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { tables.Stop() })
	return tables
}

func config(t *testing.T, patterns string) Config {
	t.Helper()
	f, err := model.ParseLabelFilter(patterns)
	if err != nil {
		t.Fatal(err)
	}
	return Config{Cluster: "lab", Filter: f}
}

const server = model.Labels("k8s:app=server;k8s:io.cilium.k8s.namespace.labels.kubernetes.io/metadata.name=default;" +
	"k8s:io.cilium.k8s.policy.cluster=lab;k8s:io.cilium.k8s.policy.serviceaccount=sa;k8s:io.kubernetes.pod.namespace=default")

func pod(name string, labels map[string]string) state.Pod {
	return state.Pod{Namespace: "default", Name: name, UID: "uid-" + name, Labels: labels, ServiceAccount: "sa"}
}

func TestLabelsOfPods(t *testing.T) {
	ns := state.Namespace{Name: "default", Labels: map[string]string{"kubernetes.io/metadata.name": "default"}}
	for _, tc := range []struct {
		name, patterns string
		pod            state.Pod
		want           model.Labels
	}{
		{"as peers print them", "", pod("a", map[string]string{"app": "server", "pod-template-hash": "55d", "controller-revision-hash": "7"}), server},
		{"what only the cluster can say", "", pod("a", map[string]string{"app": "server", "io.kubernetes.pod.namespace": "kube-system",
			"io.cilium.k8s.policy.serviceaccount": "admin", "io.cilium.k8s.policy.cluster": "other", "io.cilium.k8s.namespace.labels.team": "root"}), server},
		{"without service account", "k8s:app", state.Pod{Namespace: "default", Labels: map[string]string{"app": "x", "env": "y"}},
			"k8s:app=x;k8s:io.cilium.k8s.namespace.labels.kubernetes.io/metadata.name=default;k8s:io.cilium.k8s.policy.cluster=lab;k8s:io.kubernetes.pod.namespace=default"},
	} {
		l := labeler{cfg: config(t, tc.patterns)}
		for range 2 { // the second time from memory
			if got := l.labels(tc.pod, ns); got != tc.want {
				t.Errorf("%s: got\n%s, want\n%s", tc.name, got, tc.want)
			}
		}
	}
}

func TestKeysAreNotRememberedForEver(t *testing.T) {
	l := labeler{cfg: config(t, "")}
	for i := range 3 * rememberedKeys {
		l.labels(pod("a", map[string]string{string(rune('a'+i%26)) + netip.AddrFrom4([4]byte{byte(i >> 16), byte(i >> 8), byte(i)}).String(): ""}), state.Namespace{})
	}
	if len(l.keep) > rememberedKeys {
		t.Errorf("%d keys", len(l.keep))
	}
}

// In whatever order the facts arrive, the rows are the same, and no row is wrong meanwhile.
func TestPodIdentitiesInAnyOrder(t *testing.T) {
	facts := []func(*state.Tables){
		func(x *state.Tables) {
			state.Insert(x.DB, x.Namespaces, state.Namespace{Name: "default", Labels: map[string]string{"kubernetes.io/metadata.name": "default"}})
		},
		func(x *state.Tables) { state.Insert(x.DB, x.Pods, pod("a", map[string]string{"app": "server"})) },
		func(x *state.Tables) { state.Insert(x.DB, x.Pods, pod("b", map[string]string{"app": "client"})) },
		func(x *state.Tables) {
			p := pod("host", map[string]string{"app": "server"})
			p.HostNetwork = true
			state.Insert(x.DB, x.Pods, p)
		},
		func(x *state.Tables) {
			p := pod("done", map[string]string{"app": "server"})
			p.Phase = "Succeeded"
			state.Insert(x.DB, x.Pods, p)
		},
		func(x *state.Tables) {
			state.Insert(x.DB, x.Identities, state.Identity{ID: 28568, Labels: server, Created: 5})
		},
		func(x *state.Tables) {
			state.Insert(x.DB, x.Identities, state.Identity{ID: 300, Labels: server, Created: 6})
		},
	}
	want := []state.PodIdentity{
		{Namespace: "default", Name: "a", UID: "uid-a", Labels: server, Identity: 28568},
		{Namespace: "default", Name: "b", UID: "uid-b", Labels: "k8s:app=client" + server[len("k8s:app=server"):]},
	}
	for range 30 {
		rand.Shuffle(len(facts), func(i, j int) { facts[i], facts[j] = facts[j], facts[i] })
		tables := newTables(t)
		stage := Stage(tables, config(t, ""))
		for _, f := range facts {
			f(tables)
			stage.Step(tables.DB)
			for _, r := range state.Rows(tables.DB.ReadTxn(), tables.PodIdentities) {
				if r.Identity != 0 && (r.Labels != server || r.Identity != 28568 && r.Identity != 300) {
					t.Fatalf("row %+v", r)
				}
			}
		}
		if d := cmp.Diff(want, state.Rows(tables.DB.ReadTxn(), tables.PodIdentities)); d != "" {
			t.Fatal(d)
		}
	}
}

func TestEditedLabelsChangeTheEndpoint(t *testing.T) {
	tables := newTables(t)
	stage := Stage(tables, config(t, ""))
	compute := func() { stage.Step(tables.DB) }
	outdated := func() []model.Endpoint { return Outdated(tables, tables.DB.ReadTxn()) }
	ns := state.Namespace{Name: "default", Labels: map[string]string{"kubernetes.io/metadata.name": "default"}}
	state.Insert(tables.DB, tables.Namespaces, ns)
	state.Insert(tables.DB, tables.Pods, pod("a", map[string]string{"app": "server"}))
	ep := model.Endpoint{ID: 7, Namespace: "default", Pod: "a", UID: "uid-a", State: model.EndpointReady, ContainerID: "c"}
	compute()
	ep.Identity, ep.Labels = Identify(tables, ep)
	if ep.Identity != model.IdentityInit || !cmp.Equal(ep.Labels, map[string]string{"reserved:init": ""}) {
		t.Errorf("a new endpoint whose labels have no number has %v %v", ep.Identity, ep.Labels)
	}
	state.Insert(tables.DB, tables.Endpoints, ep)
	if got := outdated(); got != nil {
		t.Errorf("changed without a number: %+v", got)
	}
	state.Insert(tables.DB, tables.Identities, state.Identity{ID: 28568, Labels: server})
	compute()
	got := outdated()
	if len(got) != 1 || got[0].Identity != 28568 || model.LabelsOf(got[0].Labels) != server {
		t.Fatalf("got %+v", got)
	}
	if id, l := Identify(tables, ep); id != 28568 || model.LabelsOf(l) != server {
		t.Errorf("Identify says %d %v", id, l)
	}
	state.Insert(tables.DB, tables.Endpoints, got...)
	if outdated() != nil {
		t.Error("not settled")
	}
	// The namespace's labels count, too; until the new set has a number, the old one stays.
	ns.Labels = map[string]string{"kubernetes.io/metadata.name": "default", "team": "a"}
	state.Insert(tables.DB, tables.Namespaces, ns)
	compute()
	if outdated() != nil {
		t.Error("changed to no number")
	}
	pods := statedb.Collect(tables.PodIdentities.All(tables.DB.ReadTxn()))
	state.Insert(tables.DB, tables.Identities, state.Identity{ID: 400, Labels: pods[0].Labels})
	compute()
	if got := outdated(); len(got) != 1 || got[0].Identity != 400 {
		t.Errorf("got %+v", got)
	}
	// A pod of the same name that came after is another.
	p := pod("a", nil)
	p.UID = "other"
	state.Insert(tables.DB, tables.Pods, p)
	compute()
	state.Insert(tables.DB, tables.Identities, state.Identity{ID: 500, Labels: statedb.Collect(tables.PodIdentities.All(tables.DB.ReadTxn()))[0].Labels})
	compute()
	if got := outdated(); got != nil {
		t.Errorf("another pod's labels: %+v", got)
	}
	if id, _ := Identify(tables, ep); id != model.IdentityInit {
		t.Errorf("another pod's identity: %d", id)
	}
	// But the image of a static pod has a UID of its own.
	p.Mirror = true
	state.Insert(tables.DB, tables.Pods, p)
	compute()
	if got := outdated(); len(got) != 1 || got[0].Identity != 500 {
		t.Errorf("static pod: %+v", got)
	}
}

func TestPublishedEndpoints(t *testing.T) {
	a, p := netip.MustParseAddr, netip.MustParsePrefix
	tables := newTables(t)
	state.Insert(tables.DB, tables.Local, model.Node{Name: "n1", Local: true, Addrs: []netip.Addr{a("172.18.0.11"), a("fd00:172::11")}, PodCIDRs: []netip.Prefix{p("10.0.1.0/24"), p("fd00:1::/120")}})
	add := func(name string, id model.Identity, change func(*state.Pod), ep *model.Endpoint) {
		po := pod(name, nil)
		po.Ports = []state.PodPort{{Name: "http", L4: model.L4{Proto: 6, Port: 80}}}
		if change != nil {
			change(&po)
		}
		state.Insert(tables.DB, tables.Pods, po)
		state.Insert(tables.DB, tables.PodIdentities, state.PodIdentity{Namespace: "default", Name: name, UID: po.UID, Labels: server, Identity: id})
		if ep != nil {
			ep.Namespace, ep.Pod, ep.UID = "default", name, po.UID
			state.Insert(tables.DB, tables.Endpoints, *ep)
		}
	}
	ips := func(s ...string) func(*state.Pod) {
		return func(p *state.Pod) {
			for _, x := range s {
				p.IPs = append(p.IPs, a(x))
			}
		}
	}
	add("ready", 300, nil, &model.Endpoint{ID: 1, IPv4: a("10.0.1.1"), IPv6: a("fd00:1::1"), State: model.EndpointReady, ContainerID: "c1"})
	add("creating", 300, nil, &model.Endpoint{ID: 2, IPv4: a("10.0.1.2"), State: model.EndpointCreating})
	add("deleting", 300, ips("10.0.1.3"), &model.Endpoint{ID: 3, IPv4: a("10.0.1.3"), State: model.EndpointDeleting})
	add("object-only", 300, ips("10.0.1.4", "fd00:1::4"), nil)
	add("elsewhere", 300, ips("192.168.0.4"), nil)
	add("terminating", 300, func(p *state.Pod) { ips("10.0.1.5")(p); p.Terminating = true }, nil)
	add("stale-address", 300, ips("10.0.1.1"), nil)
	add("no-number", 0, nil, &model.Endpoint{ID: 6, IPv4: a("10.0.1.6"), State: model.EndpointReady})
	add("edited", 0, nil, &model.Endpoint{ID: 7, IPv4: a("10.0.1.7"), State: model.EndpointReady})
	state.Insert(tables.DB, tables.CiliumEndpoints, state.CiliumEndpoint{Namespace: "default", Name: "edited", PodUID: "uid-edited", Identity: 299})
	add("renewed", 0, nil, &model.Endpoint{ID: 8, IPv4: a("10.0.1.8"), State: model.EndpointReady})
	state.Insert(tables.DB, tables.CiliumEndpoints, state.CiliumEndpoint{Namespace: "default", Name: "renewed", PodUID: "of-before", Identity: 299})

	got := Published(tables)().Rows
	ports := []state.PodPort{{Name: "http", L4: model.L4{Proto: 6, Port: 80}}}
	row := func(name string, id uint16, identity model.Identity, st, v4, v6 string) state.PublishedEndpoint {
		r := state.PublishedEndpoint{Labels: server, Ports: ports, CiliumEndpoint: state.CiliumEndpoint{Namespace: "default", Name: name, PodUID: "uid-" + name,
			Node: a("172.18.0.11"), EndpointID: id, Identity: identity, State: st, IPv4: a(v4)}}
		if v6 != "" {
			r.IPv6 = a(v6)
		}
		return r
	}
	ready := row("ready", 1, 300, "ready", "10.0.1.1", "fd00:1::1")
	ready.ContainerID = "c1"
	want := map[string]state.PublishedEndpoint{
		"default/ready":       ready,
		"default/object-only": row("object-only", 0, 300, "disconnected", "10.0.1.4", "fd00:1::4"),
		"default/edited":      row("edited", 7, 299, "ready", "10.0.1.7", ""),
	}
	if d := cmp.Diff(want, got, cmp.Comparer(func(a, b netip.Addr) bool { return a == b })); d != "" {
		t.Error(d)
	}
	same := ready
	same.UID, same.Created, same.Labels, same.Ports = "x", 7, "", nil
	if !ready.Same(same) {
		t.Error("what the API server adds makes a difference")
	}
	if same.Identity = 301; ready.Same(same) {
		t.Error("another identity makes none")
	}
	if !slices.Equal(ready.Labels.List(), server.List()) {
		t.Error("labels")
	}
}
