// SPDX-License-Identifier: Apache-2.0

package demo

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"time"

	"github.com/lash-net/lash/sandbox/cluster"
	"github.com/lash-net/lash/sandbox/plan"
)

// world is what the checks need to know of the cluster: who is where.
type world struct {
	c       *cluster.Cluster
	web     map[string]pod // by node
	client  map[string]pod
	service map[string]netip.Addr // by family
	history history

	writeGolden string // directory; empty: golden files are compared
}

type pod struct {
	name      string
	addrs     map[string]netip.Addr // by family
	container string                // containerd's id of its only one
}

var families = []string{"v4", "v6"}

func family(a netip.Addr) string {
	if a.Is4() {
		return "v4"
	}
	return "v6"
}

// look reads the pods and the service. A pod that lacks a family is an error: everything here is dual-stack.
func look(ctx context.Context, c *cluster.Cluster) (*world, error) {
	w := &world{c: c, web: map[string]pod{}, client: map[string]pod{}, service: map[string]netip.Addr{}, history: history{}}
	out, err := c.Kubectl(ctx, "-n", "demo", "get", "pods", "-o", "json")
	if err != nil {
		return nil, err
	}
	var list struct {
		Items []struct {
			Metadata struct {
				Name              string
				Labels            map[string]string
				DeletionTimestamp string
			}
			Spec   struct{ NodeName string }
			Status struct {
				PodIPs            []struct{ IP string }
				ContainerStatuses []struct{ ContainerID string }
			}
		}
	}
	if err := json.Unmarshal([]byte(out), &list); err != nil {
		return nil, err
	}
	for _, it := range list.Items {
		if it.Metadata.DeletionTimestamp != "" {
			continue
		}
		if it.Metadata.Labels["app"] == "" {
			continue // one of resilience's
		}
		p := pod{name: it.Metadata.Name, addrs: map[string]netip.Addr{}}
		for _, i := range it.Status.PodIPs {
			a, err := netip.ParseAddr(i.IP)
			if err != nil {
				return nil, err
			}
			p.addrs[family(a)] = a
		}
		for _, f := range families {
			if !p.addrs[f].IsValid() {
				return nil, fmt.Errorf("pod %s has no %s address (podIPs %v)", p.name, f, it.Status.PodIPs)
			}
		}
		for _, s := range it.Status.ContainerStatuses {
			p.container = strings.TrimPrefix(s.ContainerID, "containerd://")
		}
		switch it.Metadata.Labels["app"] {
		case "web":
			w.web[it.Spec.NodeName] = p
		case "client":
			w.client[it.Spec.NodeName] = p
		}
	}
	for _, n := range c.Nodes {
		if w.web[n].name == "" || w.client[n].name == "" {
			return nil, fmt.Errorf("node %s lacks a pod of the demo", n)
		}
	}
	out, err = c.Kubectl(ctx, "-n", "demo", "get", "service", "web", "-o", "jsonpath={.spec.clusterIPs[*]}")
	if err != nil {
		return nil, err
	}
	for _, f := range strings.Fields(out) {
		a, err := netip.ParseAddr(f)
		if err != nil {
			return nil, err
		}
		w.service[family(a)] = a
	}
	if len(w.service) != 2 {
		return nil, fmt.Errorf("service web has cluster IPs %q, want one of each family", out)
	}
	return w, nil
}

// in runs a command in a pod.
func (w *world) in(ctx context.Context, p pod, argv ...string) (string, error) {
	return w.c.Kubectl(ctx, append([]string{"-n", "demo", "exec", p.name, "--"}, argv...)...)
}

func expect(got string, err error, want string) error {
	if err != nil {
		return err
	}
	if got = strings.TrimSpace(got); got != want {
		return fmt.Errorf("got %q, want %q", got, want)
	}
	return nil
}

// expectFrom compares the address in ADDR:PORT.
func expectFrom(got string, err error, want netip.Addr) error {
	if err != nil {
		return err
	}
	ap, perr := netip.ParseAddrPort(strings.TrimSpace(got))
	if perr != nil || ap.Addr().Unmap() != want {
		return fmt.Errorf("seen as %q, want %s", strings.TrimSpace(got), want)
	}
	return nil
}

func curl(a netip.Addr, port int, path string) []string {
	return []string{"curl", "-sS", "--fail", "--max-time", "5", "http://" + netip.AddrPortFrom(a, uint16(port)).String() + path}
}

func nodeAddr(node, fam string) netip.Addr {
	i, err := plan.NodeIndex(node)
	if err != nil {
		return netip.Addr{}
	}
	v4, v6 := plan.NodeAddrs(i)
	if fam == "v4" {
		return v4
	}
	return v6
}

func (w *world) checks(o Options) []check {
	list := []check{
		{"3 nodes Ready, pods Ready on each", w.everywhereReady},
		{"kubectl exec", func(ctx context.Context) error {
			out, err := w.in(ctx, w.client["n2"], "echo", "hello")
			return expect(out, err, "hello")
		}},
		{"kubectl logs", func(ctx context.Context) error {
			out, err := w.c.Kubectl(ctx, "-n", "demo", "logs", w.web["n3"].name)
			if err == nil && !strings.Contains(out, "serving HTTP") {
				err = fmt.Errorf("log is %q", out)
			}
			return err
		}},
		{"API server reached from a pod by name, with its certificate", func(ctx context.Context) error {
			const sa = "/var/run/secrets/kubernetes.io/serviceaccount"
			out, err := w.in(ctx, w.client["n1"], "sh", "-c", "curl -sS --fail --max-time 5 --cacert "+sa+"/ca.crt -H \"Authorization: Bearer $(cat "+sa+"/token)\" https://kubernetes.default.svc/version")
			if err == nil && !strings.Contains(out, `"gitVersion"`) {
				err = fmt.Errorf("answer %q", out)
			}
			return err
		}},
		{"API server reached from this machine with the kubeconfig", func(ctx context.Context) error {
			argv, env := w.c.KubectlCommand([]string{"--kubeconfig", w.c.Kubeconfig(false), "get", "--raw", "/readyz"})
			cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
			cmd.Env = env
			out, err := cmd.Output()
			return expect(string(out), err, "ok")
		}},
	}
	for _, f := range families {
		list = append(list, w.between(f, "same node", "n1", "n1")...)
		list = append(list, w.between(f, "across nodes", "n1", "n2")...)
		list = append(list, w.otherPair(f, "n3", "n1"), w.stream(f, "n2", "n3"))
		list = append(list, w.byName(f)...)
		list = append(list, w.hosts(f)...)
		list = append(list, w.outside(f)...)
	}
	if o.With == "lash" {
		w.writeGolden = o.WriteGolden
		list = append(list, w.lash()...)
		for _, f := range families {
			list = append(list, w.otherFrontends(f, o.Mode)...)
			list = append(list, w.explanations(f)...)
		}
		list = append(list, w.modeChecks(o.Mode)...)
	}
	return list
}

func (w *world) everywhereReady(ctx context.Context) error {
	out, err := w.c.Kubectl(ctx, "get", "nodes", "-o", `jsonpath={range .items[*]}{.metadata.name}={.status.conditions[?(@.type=="Ready")].status} {end}`)
	if err != nil {
		return err
	}
	if n := strings.Count(out, "=True "); n != nodes {
		return fmt.Errorf("%d nodes are Ready: %s", n, out)
	}
	out, err = w.c.Kubectl(ctx, "-n", "demo", "get", "pods", "--no-headers")
	if err != nil {
		return err
	}
	if n := strings.Count(out, "1/1 "); n != 2*nodes {
		return fmt.Errorf("%d of %d pods are Ready:\n%s", n, 2*nodes, out)
	}
	return nil
}

// between is ping, TCP, UDP and the preserved source address from a pod on one node to one on another.
func (w *world) between(f, where, from, to string) []check {
	src, dst := w.client[from], w.web[to]
	name := func(what string) string { return fmt.Sprintf("pod to pod, %s, %s: %s", where, f, what) }
	return []check{
		{name("ping"), func(ctx context.Context) error {
			_, err := w.in(ctx, src, "ping", "-n", "-c", "3", "-i", "0.2", "-W", "2", dst.addrs[f].String())
			return err
		}},
		{name("TCP"), func(ctx context.Context) error {
			out, err := w.in(ctx, src, curl(dst.addrs[f], 8080, "/hostname")...)
			return expect(out, err, dst.name)
		}},
		{name("UDP"), func(ctx context.Context) error {
			_, err := w.in(ctx, src, "toolbox", "probe", "-interval", "5ms", "-for", "200ms", "udp", netip.AddrPortFrom(dst.addrs[f], 8081).String())
			return err
		}},
		{name("source address kept"), func(ctx context.Context) error {
			out, err := w.in(ctx, src, curl(dst.addrs[f], 8080, "/clientip")...)
			return expectFrom(out, err, src.addrs[f])
		}},
	}
}

func (w *world) otherPair(f, from, to string) check {
	return check{fmt.Sprintf("pod on %s to pod on %s, %s: TCP", from, to, f), func(ctx context.Context) error {
		out, err := w.in(ctx, w.client[from], curl(w.web[to].addrs[f], 8080, "/hostname")...)
		return expect(out, err, w.web[to].name)
	}}
}

// stream moves enough data for segmentation offload and a full window to matter.
func (w *world) stream(f, from, to string) check {
	const size = 16 << 20
	return check{fmt.Sprintf("pod on %s to pod on %s, %s: %d MiB", from, to, f, size>>20), func(ctx context.Context) error {
		out, err := w.in(ctx, w.client[from], append(curl(w.web[to].addrs[f], 8080, fmt.Sprintf("/bytes?n=%d", size)), "-o", "/dev/null", "-w", "%{size_download}")...)
		return expect(out, err, fmt.Sprint(size))
	}}
}

// byName is the service through CoreDNS: the record, TCP, UDP, and that every backend gets its share.
func (w *world) byName(f string) []check {
	src, flag, rr := w.client["n2"], "-4", "A"
	if f == "v6" {
		flag, rr = "-6", "AAAA"
	}
	fam := strings.TrimPrefix(f, "v")
	isBackend := func(out string, err error) error {
		if err == nil && !strings.HasPrefix(strings.TrimSpace(out), "web-") {
			err = fmt.Errorf("answer %q", out)
		}
		return err
	}
	return []check{
		{"CoreDNS from a pod: " + rr + " record of a service", func(ctx context.Context) error {
			out, err := w.in(ctx, src, "dig", "+short", "+time=2", "+tries=1", rr, "web.demo.svc.cluster.local")
			return expect(out, err, w.service[f].String())
		}},
		{"CoreDNS " + f + " service address from a pod over TCP", func(ctx context.Context) error {
			dns := plan.DNS4
			if f == "v6" {
				dns = plan.DNS6
			}
			out, err := w.in(ctx, src, "dig", "+tcp", "+short", "+time=2", "+tries=1", "@"+dns.String(), rr, "web.demo.svc.cluster.local")
			return expect(out, err, w.service[f].String())
		}},
		{"ClusterIP by name, " + f + ": TCP", func(ctx context.Context) error {
			return isBackend(w.in(ctx, src, "curl", flag, "-sS", "--fail", "--max-time", "5", "http://web.demo/hostname"))
		}},
		{"ClusterIP by name, " + f + ": UDP, answered from the service's address", func(ctx context.Context) error {
			return isBackend(w.in(ctx, src, "toolbox", "ask", "udp"+fam, "web.demo:81", "hostname"))
		}},
		{"ClusterIP, " + f + ": every backend is used", func(ctx context.Context) error {
			url := "http://" + netip.AddrPortFrom(w.service[f], 80).String() + "/hostname"
			out, err := w.in(ctx, src, "sh", "-c", "for i in $(seq 60); do curl -sS --fail --max-time 5 -g '"+url+"' && echo; done | sort -u | grep -c web-")
			return expect(out, err, fmt.Sprint(nodes))
		}},
	}
}

// hosts is traffic between pods and the nodes themselves.
func (w *world) hosts(f string) []check {
	toPod := func(what, from, to string) check {
		return check{fmt.Sprintf("host to pod, %s, %s", what, f), func(ctx context.Context) error {
			out, err := w.c.Exec(ctx, from, curl(w.web[to].addrs[f], 8080, "/hostname")...)
			return expect(out, err, w.web[to].name)
		}}
	}
	toHost := func(what, from, to string) check { // kubelet answers 401 to strangers
		return check{fmt.Sprintf("pod to host, %s, %s", what, f), func(ctx context.Context) error {
			url := "https://" + netip.AddrPortFrom(nodeAddr(to, f), 10250).String() + "/healthz"
			out, err := w.in(ctx, w.client[from], "curl", "-sS", "-k", "-g", "--max-time", "5", "-o", "/dev/null", "-w", "%{http_code}", url)
			return expect(out, err, "401")
		}}
	}
	return []check{
		toPod("own node", "n1", "n1"), toPod("other node", "n1", "n2"),
		toHost("own node", "n1", "n1"), toHost("other node", "n1", "n3"),
		{"host process to ClusterIP, " + f, func(ctx context.Context) error {
			out, err := w.c.Exec(ctx, "n2", curl(w.service[f], 80, "/hostname")...)
			if err == nil && !strings.HasPrefix(out, "web-") {
				err = fmt.Errorf("answer %q", out)
			}
			return err
		}},
		{"host to ClusterIP, " + f + ": ping", func(ctx context.Context) error {
			_, err := w.c.Exec(ctx, "n2", "ping", "-n", "-c", "2", "-i", "0.2", "-W", "2", w.service[f].String())
			return err
		}},
		{"host to ClusterIP, " + f + ": a port that nobody serves is refused at once", func(ctx context.Context) error {
			// 7: no connection; 28 would be that nobody answered.
			script := "curl -sS -g --max-time 3 http://" + netip.AddrPortFrom(w.service[f], 9).String() + "/ 2>&1; echo $?"
			out, err := w.c.Exec(ctx, "n2", "sh", "-c", script)
			if err == nil && !strings.HasSuffix(strings.TrimSpace(out), "\n7") {
				err = fmt.Errorf("curl says %q", out)
			}
			return err
		}},
	}
}

// outside is traffic that leaves the cluster: it must carry the node's address.
func (w *world) outside(f string) []check {
	near, far := plan.Outside4, plan.Beyond4.Addr()
	if f == "v6" {
		near, far = plan.Outside6, plan.Beyond6.Addr()
	}
	src, node := w.client["n3"], nodeAddr("n3", f)
	return []check{
		{"pod to outside, " + f + ": TCP seen as the node's address", func(ctx context.Context) error {
			out, err := w.in(ctx, src, curl(near, 8080, "/clientip")...)
			return expectFrom(out, err, node)
		}},
		{"pod to outside, " + f + ": UDP seen as the node's address", func(ctx context.Context) error {
			out, err := w.in(ctx, src, "toolbox", "ask", "udp", netip.AddrPortFrom(near, 8081).String(), "clientip")
			return expectFrom(out, err, node)
		}},
		{"pod to outside, " + f + ": ping", func(ctx context.Context) error {
			_, err := w.in(ctx, src, "ping", "-n", "-c", "2", "-i", "0.2", "-W", "2", near.String())
			return err
		}},
		{"pod to outside behind the default gateway, " + f + ": TCP seen as the node's address", func(ctx context.Context) error {
			out, err := w.in(ctx, src, curl(far, 8080, "/clientip")...)
			return expectFrom(out, err, node)
		}},
	}
}

// lash is what only Lash promises.
func (w *world) lash() []check {
	var list []check
	for _, n := range w.c.Nodes {
		list = append(list, check{"lash status on " + n + ": host routing by BPF", func(ctx context.Context) error {
			name, err := w.c.Kubectl(ctx, "-n", "kube-system", "get", "pods", "-l", "k8s-app=lash", "--field-selector=spec.nodeName="+n, "-o", "jsonpath={.items[0].metadata.name}")
			if err != nil {
				return err
			}
			out, err := w.c.Kubectl(ctx, "-n", "kube-system", "exec", name, "-c", "lash-agent", "--", "lash", "status")
			if err != nil {
				return err
			}
			for line := range strings.Lines(out) {
				if k, v, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(k) == "Host Routing" && strings.TrimSpace(v) == "BPF" {
					return nil
				}
			}
			return fmt.Errorf("status says:\n%s", out)
		}})
	}
	for _, n := range w.c.Nodes {
		list = append(list, check{"lash status on " + n + ": all nodes and health endpoints reachable", func(ctx context.Context) error { return w.allReachable(ctx, n) }})
	}
	return append(list, check{"no kube-proxy runs", func(ctx context.Context) error {
		for _, n := range w.c.Nodes {
			out, err := w.c.Exec(ctx, n, "sh", "-c", "cat /proc/[0-9]*/comm")
			if err != nil && !errors.Is(err, os.ErrNotExist) && out == "" {
				return err
			}
			if strings.Contains(out, "kube-proxy") {
				return fmt.Errorf("a kube-proxy runs on %s", n)
			}
		}
		return nil
	}})
}

// allReachable waits until the node's agent has reached every node and health endpoint in every way.
func (w *world) allReachable(ctx context.Context, node string) error {
	if out, err := w.c.Exec(ctx, node, "ip", "link", "show", "lxc_health"); err != nil {
		return fmt.Errorf("%w: %s", err, out)
	}
	return until(ctx, 60*time.Second, func(ctx context.Context) error {
		out, err := w.lashOn(ctx, node, "health", "status", "-o", "json")
		if err != nil {
			return err
		}
		var h struct {
			Reachable, Total int
			Nodes            []struct {
				Name  string
				Paths []struct {
					Endpoint bool
				}
			}
		}
		if err := json.Unmarshal([]byte(out), &h); err != nil {
			return err
		}
		if h.Reachable != len(w.c.Nodes) || h.Total != len(w.c.Nodes) {
			return fmt.Errorf("%d of %d nodes reachable, want %d:\n%s", h.Reachable, h.Total, len(w.c.Nodes), out)
		}
		for _, n := range h.Nodes {
			endpoints := 0
			for _, p := range n.Paths {
				if p.Endpoint {
					endpoints++
				}
			}
			if endpoints != 2 {
				return fmt.Errorf("%s has a health endpoint with %d addresses, want one of each family", n.Name, endpoints)
			}
		}
		return nil
	})
}
