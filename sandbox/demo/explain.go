// SPDX-License-Identifier: Apache-2.0

package demo

import (
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/lash-net/lash/sandbox/plan"
)

// explained is what `lash explain` must say of a packet: what the check of that name shows of a real one.
type explained struct {
	name     string
	src, dst string // as explain takes them
	flags    []string
	want     []string // verdicts, one for each way, in any order
}

// explainNode is where explain is asked: of a packet that begins elsewhere, the node it begins at is asked by this one.
const explainNode = "n2"

// explanations compares explain with every check of connectivity of a family. "delivered POD", "host NODE", "sent NODE from
// ADDRESS".
func (w *world) explanations(f string) []check {
	client := func(n string) string { return "demo/" + w.client[n].name }
	at := func(a netip.Addr, port uint16, proto string) string {
		if port == 0 {
			return a.String()
		}
		return netip.AddrPortFrom(a, port).String() + "/" + proto
	}
	delivered := func(n string) []string { return []string{"delivered demo/" + w.web[n].name} }
	family := "-" + strings.TrimPrefix(f, "v")
	near, far, dns := plan.Outside4, plan.Beyond4.Addr(), plan.DNS4
	if f == "v6" {
		near, far, dns = plan.Outside6, plan.Beyond6.Addr(), plan.DNS6
	}
	var list []explained
	for _, p := range []struct{ where, from, to string }{{"same node", "n1", "n1"}, {"across nodes", "n1", "n2"}} {
		for what, dst := range map[string]string{
			"ping": "demo/" + w.web[p.to].name, "TCP": at(w.web[p.to].addrs[f], 8080, "tcp"), "UDP": at(w.web[p.to].addrs[f], 8081, "udp"),
		} {
			list = append(list, explained{fmt.Sprintf("pod to pod, %s: %s", p.where, what), client(p.from), dst, []string{family}, delivered(p.to)})
		}
	}
	var backends []string
	for _, n := range w.c.Nodes {
		backends = append(backends, delivered(n)...)
	}
	sent := []string{"sent n3 from " + nodeAddr("n3", f).String()}
	list = append(list,
		explained{"pod on n3 to pod on n1: TCP", client("n3"), "demo/" + w.web["n1"].name + ":8080", []string{family}, delivered("n1")},
		explained{"pod on n2 to pod on n3: TCP", client("n2"), "pod/demo/" + w.web["n3"].name + ":8080/tcp", []string{family}, delivered("n3")},
		explained{"CoreDNS service address over TCP", client("n2"), at(dns, 53, "tcp"), nil, []string{"delivered kube-system/coredns"}},
		explained{"ClusterIP by name: TCP", client("n2"), "web.demo.svc.cluster.local:80", []string{family, "--all"}, backends},
		explained{"ClusterIP: UDP", client("n2"), "svc/demo/web:81/udp", []string{family, "--all"}, backends},
		explained{"host process to ClusterIP", "n2", at(w.service[f], 80, "tcp"), []string{"--all"}, backends},
		explained{"host to pod, own node", "n1", "demo/" + w.web["n1"].name + ":8080", []string{family}, delivered("n1")},
		explained{"host to pod, other node", "n1", "demo/" + w.web["n2"].name + ":8080", []string{family}, delivered("n2")},
		explained{"pod to host, own node", client("n1"), at(nodeAddr("n1", f), 10250, "tcp"), nil, []string{"host n1"}},
		explained{"pod to host, other node", client("n1"), "node/n3:10250", []string{family}, []string{"host n3"}},
		explained{"pod to outside: TCP", client("n3"), at(near, 8080, "tcp"), nil, sent},
		explained{"pod to outside: UDP", client("n3"), at(near, 8081, "udp"), nil, sent},
		explained{"pod to outside: ping", client("n3"), near.String(), nil, sent},
		explained{"pod to outside behind the default gateway: TCP", client("n3"), at(far, 8080, "tcp"), nil, sent},
	)
	var checks []check
	for _, e := range list {
		checks = append(checks, check{fmt.Sprintf("lash explain, %s: %s", f, e.name), func(ctx context.Context) error { return w.explains(ctx, e) }})
	}
	return checks
}

func (w *world) explains(ctx context.Context, e explained) error {
	out, err := w.lashOn(ctx, explainNode, append([]string{"explain", e.src, e.dst, "-o", "json"}, e.flags...)...)
	if err != nil {
		return err
	}
	var said struct {
		Ways []struct {
			Verdict struct{ Outcome, Node, Pod, Packet, Text string }
		}
	}
	if err := json.Unmarshal([]byte(out), &said); err != nil {
		return err
	}
	var got []string
	for _, way := range said.Ways {
		v := way.Verdict
		switch v.Outcome {
		case "delivered":
			// Of a deployment's pods any will do.
			name := v.Pod
			if strings.HasPrefix(name, "kube-system/coredns-") {
				name = "kube-system/coredns"
			}
			got = append(got, "delivered "+name)
		case "sent":
			from, _, _ := strings.Cut(v.Packet, " -> ")
			if ap, err := netip.ParseAddrPort(from); err == nil {
				from = ap.Addr().String()
			}
			got = append(got, "sent "+v.Node+" from "+from)
		default:
			got = append(got, v.Outcome+" "+v.Node)
		}
	}
	want := slices.Sorted(slices.Values(e.want))
	if slices.Sort(got); !slices.Equal(got, want) {
		return fmt.Errorf("explain %s %s says %q, want %q:\n%s", e.src, e.dst, got, want, out)
	}
	return nil
}
