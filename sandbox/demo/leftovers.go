// SPDX-License-Identifier: Apache-2.0

package demo

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/lash-net/lash/sandbox/cluster"
)

// wanted is what the API server says there is.
type wanted struct {
	nodes     map[string]nodeFacts
	custom    []string                   // names of CiliumNodes
	pods      map[netip.Addr]podFacts    // by each address; without those of the host's network
	frontends map[string]bool            // ADDR:PORT/PROTO
	hostPorts map[string]map[string]bool // the same, of pods, by node
	vips      map[string]bool            // addresses of the frontends
	routed    map[netip.Addr]bool        // of them those that nodes have routes to: false where it is somebody's external address, too
	backends  map[netip.AddrPort]string  // protocols are those of their service
	ready     map[netip.AddrPort]bool    // of the backends
}

type nodeFacts struct {
	addrs   []netip.Addr // of its Node
	routers []netip.Addr
	cidrs   []netip.Prefix
}

type podFacts struct{ name, node string }

// kernel is what is on one node, and what its agent has in its tables of endpoints.
type kernel struct {
	links     []string
	addrs     []netip.Addr // of the node's own devices
	routes    []routeFacts // of protocol 76, which is Lash's
	services  []routeFacts // of protocol 77, which are to services' addresses
	endpoints []endpointFacts
	tables    map[string][][]string // rows of lash bpf NAME list
	pins      []string              // files in bpffs, lash/links
}

type routeFacts struct{ Dst, Gateway, Dev string }

type endpointFacts struct {
	Namespace, Pod, IfName string
	IPv4, IPv6             string
}

// bpfTables are what kernel.tables has.
var bpfTables = []string{"endpoint", "device", "ipcache", "lb", "ct", "nat", "socket"}

// history is who had which addresses, so that what is left can be named after its owner.
type history map[netip.Prefix]string

func (h history) remember(w wanted) {
	for name, n := range w.nodes {
		for _, a := range slices.Concat(n.addrs, n.routers) {
			h[single(a)] = "node " + name
		}
		for _, c := range n.cidrs {
			h[c] = "pod CIDR of node " + name
		}
	}
	for a, p := range w.pods {
		h[single(a)] = "pod " + p.name + " of node " + p.node
	}
}

// owner of an address, or of the prefix that it lies in.
func (h history) owner(a netip.Addr) string {
	if o, ok := h[single(a)]; ok {
		return o
	}
	for p, o := range h {
		if p.Contains(a) {
			return o
		}
	}
	return ""
}

// healthEndpoint is the "pod" of a node's health endpoint, which has neither namespace nor name.
const healthEndpoint = "/"

func single(a netip.Addr) netip.Prefix { return netip.PrefixFrom(a, a.BitLen()) }

// compare lists what is on a node and should not be, and what should be and is not. Each line names the object.
func (w wanted) compare(node string, k kernel, h history) []string {
	var out []string
	left := func(format string, args ...any) { out = append(out, node+": left: "+fmt.Sprintf(format, args...)) }
	missing := func(format string, args ...any) { out = append(out, node+": missing: "+fmt.Sprintf(format, args...)) }

	routes := map[string]string{} // gateway by destination
	local := map[netip.Addr]bool{}
	for name, n := range w.nodes {
		for _, c := range n.cidrs {
			routes[c.String()] = ""
			for _, a := range n.addrs {
				if name != node && a.Is4() == c.Addr().Is4() {
					routes[c.String()] = a.String()
				}
			}
		}
		if name == node {
			for _, a := range n.routers {
				routes[a.String()] = ""
			}
			for _, a := range slices.Concat(n.addrs, n.routers, k.addrs) {
				local[a] = true
			}
		}
	}
	own := map[string]bool{}
	for _, r := range k.routes {
		gateway, ok := routes[r.Dst]
		own[r.Dst] = true
		switch {
		case !ok:
			left("route %s via %s dev %s%s", r.Dst, r.Gateway, r.Dev, h.of(prefix(r.Dst)))
		case gateway != "" && gateway != r.Gateway && r.Dev != "lash_host": // which is the way into a tunnel
			left("route %s via %s, want via %s", r.Dst, r.Gateway, gateway)
		}
	}
	for dst := range routes {
		if !own[dst] {
			missing("route %s", dst)
		}
	}

	toServices := map[netip.Addr]bool{}
	for _, r := range k.services {
		a := prefix(r.Dst).Addr()
		toServices[a] = true
		if !w.routed[a] || local[a] {
			left("route %s dev %s: there is no such service", r.Dst, r.Dev)
		}
	}
	for a, routed := range w.routed {
		if routed && !local[a] && !toServices[a] {
			missing("route to service %s", a)
		}
	}

	devices := map[string]bool{}
	for _, e := range k.endpoints {
		devices[e.IfName] = true
		if p, ok := w.pods[address(e.IPv4)]; !ok || p.name != e.Namespace+"/"+e.Pod || p.node != node {
			left("endpoint of pod %s/%s (%s), which is gone", e.Namespace, e.Pod, e.IPv4)
		}
		if !slices.Contains(k.links, e.IfName) {
			missing("device %s of pod %s/%s", e.IfName, e.Namespace, e.Pod)
		}
	}
	for _, l := range k.links {
		if strings.HasPrefix(l, "lxc") && !devices[l] {
			left("device %s, of no endpoint", l)
		}
	}
	for _, p := range k.pins {
		i := strings.LastIndexByte(p, '-')
		if device := p[:max(i, 0)]; device != "cgroup" && !slices.Contains(k.links, device) {
			left("pinned link %s: there is no such device", p)
		}
	}

	found := map[netip.Addr]bool{}
	for _, row := range k.tables["endpoint"] {
		a := address(row[0])
		found[a] = true
		if p, ok := w.pods[a]; !local[a] && (!ok || p.node != node) {
			left("row of bpf endpoint %s%s", row[0], h.of(single(a)))
		}
	}
	for a, p := range w.pods {
		if p.node == node && !found[a] {
			missing("row of bpf endpoint %s, pod %s", a, p.name)
		}
	}
	for _, row := range k.tables["device"] {
		if !slices.Contains(k.links, row[1]) {
			left("row of bpf device: interface number %s, which there is not", row[0])
		}
	}
	for _, row := range k.tables["ipcache"] {
		p := prefix(row[0])
		if p.Bits() > 0 && !w.known(p, local) {
			left("row of bpf ipcache %s%s", row[0], h.of(p))
		}
		if _, via, ok := strings.Cut(row[1], "tunnelendpoint="); ok {
			a := address(strings.Fields(via)[0])
			if !a.IsUnspecified() && !w.isNode(a) {
				left("row of bpf ipcache %s: behind %s%s", row[0], a, h.of(single(a)))
			}
		}
	}
	services := map[string]bool{}
	for _, row := range k.tables["lb"] {
		frontend, _, _ := strings.Cut(row[0], " ")
		services[frontend] = true
		at, address := strings.CutSuffix(frontend, ":0/ANY")
		if address && w.vips[at] {
			continue
		}
		if !w.frontends[frontend] && !w.hostPorts[node][frontend] {
			left("row of bpf lb %s: there is no such service", row[0])
		}
		backend, _, ok := strings.Cut(row[1], "/")
		if b, err := netip.ParseAddrPort(backend); ok && err == nil && w.backends[b] == "" {
			left("row of bpf lb %s: backend %s%s", row[0], backend, h.of(single(b.Addr())))
		}
	}
	for _, all := range []map[string]bool{w.frontends, w.hostPorts[node]} {
		for f := range all {
			if !services[f] {
				missing("row of bpf lb %s", f)
			}
		}
	}
	for table, columns := range map[string][]int{"ct": {1, 2}, "nat": {2, 4}, "socket": {1}} {
		for _, row := range k.tables[table] {
			for _, c := range columns {
				a := addrPort(row[c])
				if a.IsValid() && !local[a] && w.gone(a, h) {
					left("row of bpf %s %s%s", table, strings.Join(row[:4], " "), h.of(single(a)))
				}
			}
		}
	}
	slices.Sort(out)
	return out
}

// of is what h knows of a prefix, to be put behind its name.
func (h history) of(p netip.Prefix) string {
	if !p.IsValid() {
		return ""
	}
	if o := h.owner(p.Addr()); o != "" {
		return " (" + o + ")"
	}
	return " (nobody's)"
}

// known: a node, a pod, a backend, or a pod CIDR has the prefix.
func (w wanted) known(p netip.Prefix, local map[netip.Addr]bool) bool {
	if !p.IsSingleIP() {
		for _, n := range w.nodes {
			if slices.Contains(n.cidrs, p) {
				return true
			}
		}
		return false
	}
	a := p.Addr()
	if _, pod := w.pods[a]; pod || local[a] || w.isNode(a) {
		return true
	}
	for b := range w.backends {
		if b.Addr() == a {
			return true
		}
	}
	return false
}

func (w wanted) isNode(a netip.Addr) bool {
	for _, n := range w.nodes {
		if slices.Contains(n.addrs, a) || slices.Contains(n.routers, a) {
			return true
		}
	}
	return false
}

// gone: the address was a pod's or a node's, or lies in a pod CIDR, and nobody has it now.
func (w wanted) gone(a netip.Addr, h history) bool {
	if w.known(single(a), nil) {
		return false
	}
	for _, n := range w.nodes {
		for _, c := range n.cidrs {
			if c.Contains(a) {
				return true
			}
		}
	}
	return h.owner(a) != ""
}

func address(s string) netip.Addr {
	a, _ := netip.ParseAddr(s)
	return a.Unmap()
}

func addrPort(s string) netip.Addr {
	ap, _ := netip.ParseAddrPort(s)
	return ap.Addr().Unmap()
}

// prefix parses as ip(8) writes: a single address without its length.
func prefix(s string) netip.Prefix {
	if p, err := netip.ParsePrefix(s); err == nil {
		return p
	}
	if a := address(s); a.IsValid() {
		return single(a)
	}
	return netip.Prefix{}
}

// leftovers compares all nodes with what the API server says, until they agree.
func (w *world) leftovers(ctx context.Context) error {
	return until(ctx, 60*time.Second, func(ctx context.Context) error {
		found, err := w.lookForLeftovers(ctx)
		if err != nil || len(found) == 0 {
			return err
		}
		more := ""
		if n := len(found) - 12; n > 0 {
			found, more = found[:12], fmt.Sprintf("; and %d more", n)
		}
		return errors.New(strings.Join(found, "; ") + more)
	})
}

func (w *world) lookForLeftovers(ctx context.Context) ([]string, error) {
	want, err := readWanted(ctx, w.c)
	if err != nil {
		return nil, err
	}
	w.history.remember(want)
	found := make([][]string, len(w.c.Nodes))
	errs := make([]error, len(w.c.Nodes))
	var wg sync.WaitGroup
	for i, n := range w.c.Nodes {
		wg.Go(func() {
			k, err := readKernel(ctx, w.c, n)
			if err != nil {
				errs[i] = err
				return
			}
			found[i] = want.compare(n, k, w.history)
		})
	}
	wg.Wait()
	all := slices.Concat(found...)
	for _, name := range want.custom {
		if _, ok := want.nodes[name]; !ok {
			all = append(all, "left: CiliumNode "+name+", of no Node")
		}
	}
	return all, errors.Join(errs...)
}

// readWanted asks the API server.
func readWanted(ctx context.Context, c *cluster.Cluster) (wanted, error) {
	out, err := c.Kubectl(ctx, "get", "nodes,ciliumnodes,pods,services,endpointslices", "-A", "-o", "json")
	if err != nil {
		return wanted{}, err
	}
	return parseWanted([]byte(out))
}

func parseWanted(list []byte) (wanted, error) {
	w := wanted{nodes: map[string]nodeFacts{}, pods: map[netip.Addr]podFacts{}, frontends: map[string]bool{}, hostPorts: map[string]map[string]bool{}, vips: map[string]bool{}, routed: map[netip.Addr]bool{},
		backends: map[netip.AddrPort]string{}, ready: map[netip.AddrPort]bool{}}
	type port struct {
		Port     uint16
		NodePort uint16
		HostPort uint16
		Protocol string
	}
	var objects struct {
		Items []struct {
			Kind     string
			Metadata struct{ Namespace, Name string }
			Spec     struct {
				NodeName    string
				HostNetwork bool
				Addresses   []struct{ Type, IP string }
				Health      struct{ IPv4, IPv6 string }
				IPAM        struct{ PodCIDRs []netip.Prefix }
				ClusterIPs  []string
				ExternalIPs []string
				Ports       []port
				Containers  []struct{ Ports []port }
			}
			Status struct {
				Phase     string
				PodIPs    []struct{ IP string }
				Addresses []struct{ Type, Address string }

				LoadBalancer struct{ Ingress []struct{ IP string } }
			}
			Endpoints []struct {
				Addresses  []string
				Conditions struct{ Ready *bool }
			}
			Ports []port
		}
	}
	if err := json.Unmarshal(list, &objects); err != nil {
		return w, err
	}
	for _, o := range objects.Items {
		switch o.Kind {
		case "Node":
			n := w.nodes[o.Metadata.Name]
			for _, a := range o.Status.Addresses {
				if a.Type == "InternalIP" {
					n.addrs = append(n.addrs, address(a.Address))
				}
			}
			w.nodes[o.Metadata.Name] = n
		case "Pod":
			if o.Spec.HostNetwork || o.Status.Phase == "Succeeded" || o.Status.Phase == "Failed" {
				continue
			}
			for _, i := range o.Status.PodIPs {
				w.pods[address(i.IP)] = podFacts{o.Metadata.Namespace + "/" + o.Metadata.Name, o.Spec.NodeName}
				for _, c := range o.Spec.Containers {
					for _, p := range c.Ports {
						if p.HostPort == 0 {
							continue
						}
						if w.hostPorts[o.Spec.NodeName] == nil {
							w.hostPorts[o.Spec.NodeName] = map[string]bool{}
						}
						w.hostPorts[o.Spec.NodeName][frontend(everywhere(address(i.IP)), p.HostPort, p.Protocol)] = true
					}
				}
			}
		case "Service":
			headless := !slices.ContainsFunc(o.Spec.ClusterIPs, func(s string) bool { return address(s).IsValid() })
			addrs := slices.Concat(o.Spec.ClusterIPs, o.Spec.ExternalIPs)
			for _, in := range o.Status.LoadBalancer.Ingress {
				addrs = append(addrs, in.IP)
			}
			for _, ip := range addrs {
				for _, p := range o.Spec.Ports {
					if a := address(ip); a.IsValid() && !headless {
						w.frontends[frontend(a, p.Port, p.Protocol)] = true
						w.vips[strings.TrimSuffix(netip.AddrPortFrom(a, 0).String(), ":0")] = true
						if slices.Contains(o.Spec.ExternalIPs, ip) {
							w.routed[a] = false
						} else if _, known := w.routed[a]; !known {
							w.routed[a] = true
						}
						if p.NodePort != 0 {
							w.frontends[frontend(everywhere(a), p.NodePort, p.Protocol)] = true
						}
					}
				}
			}
		case "EndpointSlice":
			for _, e := range o.Endpoints {
				for _, a := range e.Addresses {
					for _, p := range o.Ports {
						b := netip.AddrPortFrom(address(a), p.Port)
						w.backends[b] = o.Metadata.Namespace + "/" + o.Metadata.Name
						w.ready[b] = w.ready[b] || e.Conditions.Ready == nil || *e.Conditions.Ready
					}
				}
			}
		}
	}
	for _, o := range objects.Items {
		if o.Kind != "CiliumNode" {
			continue
		}
		w.custom = append(w.custom, o.Metadata.Name)
		n, ok := w.nodes[o.Metadata.Name]
		if !ok {
			continue
		}
		n.cidrs = o.Spec.IPAM.PodCIDRs
		for _, a := range o.Spec.Addresses {
			if a.Type == "CiliumInternalIP" {
				n.routers = append(n.routers, address(a.IP))
			}
		}
		w.nodes[o.Metadata.Name] = n
		for _, h := range []string{o.Spec.Health.IPv4, o.Spec.Health.IPv6} {
			if a := address(h); a.IsValid() {
				w.pods[a] = podFacts{healthEndpoint, o.Metadata.Name}
			}
		}
	}
	return w, nil
}

func frontend(a netip.Addr, port uint16, proto string) string {
	return netip.AddrPortFrom(a, port).String() + "/" + proto
}

// everywhere is the unspecified address of a's family.
func everywhere(a netip.Addr) netip.Addr {
	if a.Is6() {
		return netip.IPv6Unspecified()
	}
	return netip.IPv4Unspecified()
}

// readKernel asks ip(8), the agent's own lash, and the BPF file system. All on the node: the API server may be away.
func readKernel(ctx context.Context, c *cluster.Cluster, node string) (kernel, error) {
	script := `set -e
agent=$(pidof -s lash-agent) || { echo 'no lash-agent runs' >&2; exit 1; }
lash=/proc/$agent/root/usr/bin/lash
ip -j addr
ip -j -4 route show proto ` + fmt.Sprint(routeProtocol) + `
ip -j -6 route show proto ` + fmt.Sprint(routeProtocol) + `
ip -j -4 route show table local proto ` + fmt.Sprint(serviceRouteProtocol) + `
ip -j -6 route show table local proto ` + fmt.Sprint(serviceRouteProtocol) + `
$lash endpoint list -o json
for t in ` + strings.Join(bpfTables, " ") + `; do $lash bpf $t list -o json; done
for f in /sys/fs/bpf/lash/links/*; do echo "\"${f##*/}\""; done`
	out, err := c.Exec(ctx, node, "sh", "-c", script)
	if err != nil {
		return kernel{}, err
	}
	k, err := parseKernel(strings.NewReader(out))
	if err != nil {
		return k, fmt.Errorf("what ip and lash say on %s: %w", node, err)
	}
	return k, nil
}

const (
	routeProtocol        = 76
	serviceRouteProtocol = 77
)

// parseKernel reads the JSON values that the script of readKernel prints one after the other.
func parseKernel(r io.Reader) (kernel, error) {
	k := kernel{tables: map[string][][]string{}}
	var links []struct {
		IfName   string
		AddrInfo []struct{ Local string } `json:"addr_info"`
	}
	var v4, v6, services4, services6 []routeFacts
	d := json.NewDecoder(r)
	for _, into := range []any{&links, &v4, &v6, &services4, &services6, &k.endpoints} {
		if err := d.Decode(into); err != nil {
			return k, err
		}
	}
	k.routes, k.services = append(v4, v6...), append(services4, services6...)
	for _, l := range links {
		k.links = append(k.links, l.IfName)
		for _, a := range l.AddrInfo {
			k.addrs = append(k.addrs, address(a.Local))
		}
	}
	for range bpfTables {
		var t struct {
			Name string
			Rows [][]string
		}
		if err := d.Decode(&t); err != nil {
			return k, err
		}
		k.tables[t.Name] = t.Rows
	}
	for {
		var pin string
		if err := d.Decode(&pin); errors.Is(err, io.EOF) {
			return k, nil
		} else if err != nil {
			return k, err
		}
		k.pins = append(k.pins, pin)
	}
}
