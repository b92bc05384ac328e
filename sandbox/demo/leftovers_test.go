// SPDX-License-Identifier: Apache-2.0

package demo

import (
	"slices"
	"strings"
	"testing"
)

// two nodes, a pod on each, a service with both as backends
const objects = `{"items": [
 {"kind": "Node", "metadata": {"name": "n1"}, "status": {"addresses": [{"type": "InternalIP", "address": "172.18.0.11"}, {"type": "Hostname", "address": "n1"}]}},
 {"kind": "Node", "metadata": {"name": "n2"}, "status": {"addresses": [{"type": "InternalIP", "address": "172.18.0.12"}]}},
 {"kind": "CiliumNode", "metadata": {"name": "n1"}, "spec": {"addresses": [{"type": "CiliumInternalIP", "ip": "10.0.0.1"}], "ipam": {"podCIDRs": ["10.0.0.0/24"]}}},
 {"kind": "CiliumNode", "metadata": {"name": "n2"}, "spec": {"addresses": [{"type": "CiliumInternalIP", "ip": "10.0.1.1"}], "ipam": {"podCIDRs": ["10.0.1.0/24"]}}},
 {"kind": "Pod", "metadata": {"namespace": "demo", "name": "a"}, "spec": {"nodeName": "n1", "containers": [{"ports": [{"containerPort": 8080, "protocol": "TCP"}, {"containerPort": 8080, "hostPort": 8090, "protocol": "TCP"}]}]}, "status": {"phase": "Running", "podIPs": [{"ip": "10.0.0.2"}]}},
 {"kind": "Pod", "metadata": {"namespace": "demo", "name": "b"}, "spec": {"nodeName": "n2"}, "status": {"phase": "Running", "podIPs": [{"ip": "10.0.1.2"}]}},
 {"kind": "Pod", "metadata": {"namespace": "demo", "name": "done"}, "spec": {"nodeName": "n1"}, "status": {"phase": "Succeeded", "podIPs": [{"ip": "10.0.0.2"}]}},
 {"kind": "Pod", "metadata": {"namespace": "kube-system", "name": "lash"}, "spec": {"nodeName": "n1", "hostNetwork": true}, "status": {"phase": "Running", "podIPs": [{"ip": "172.18.0.11"}]}},
 {"kind": "Service", "metadata": {"namespace": "demo", "name": "web"}, "spec": {"clusterIPs": ["10.96.0.7"], "externalIPs": ["198.51.100.80"], "ports": [{"port": 80, "nodePort": 30080, "protocol": "TCP"}]}, "status": {"loadBalancer": {"ingress": [{"ip": "198.51.100.81"}, {"hostname": "lb.example"}]}}},
 {"kind": "Service", "metadata": {"namespace": "demo", "name": "headless"}, "spec": {"clusterIPs": ["None"], "externalIPs": ["198.51.100.82"], "ports": [{"port": 80, "protocol": "TCP"}]}},
 {"kind": "EndpointSlice", "metadata": {"namespace": "demo", "name": "web-x"}, "endpoints": [{"addresses": ["10.0.0.2"]}, {"addresses": ["10.0.1.2"]}], "ports": [{"port": 8080, "protocol": "TCP"}]}
]}`

// what n1 says when all is well
const healthy = `
[{"ifname": "lo", "addr_info": [{"local": "127.0.0.1"}]}, {"ifname": "eth0", "addr_info": [{"local": "172.18.0.11"}, {"local": "fe80::1"}]}, {"ifname": "lash_host"}, {"ifname": "lxcaaaaaaaaaaaa"}]
[{"dst": "10.0.0.1", "dev": "lash_host"}, {"dst": "10.0.0.0/24", "gateway": "10.0.0.1", "dev": "lash_host"}, {"dst": "10.0.1.0/24", "gateway": "172.18.0.12", "dev": "eth0"}]
[]
[{"dst": "10.96.0.7", "dev": "lash_host"}, {"dst": "198.51.100.81", "dev": "lash_host"}]
[]
[{"Namespace": "demo", "Pod": "a", "IfName": "lxcaaaaaaaaaaaa", "IPv4": "10.0.0.2"}]
{"name": "endpoint", "rows": [["10.0.0.1", "(localhost)"], ["10.0.0.2", "id=1"], ["172.18.0.11", "(localhost)"]]}
{"name": "device", "rows": [["2", "eth0", "network", "172.18.0.11", "", ""], ["7", "lxcaaaaaaaaaaaa", "pod", "10.0.0.2", "", ""]]}
{"name": "ipcache", "rows": [["0.0.0.0/0", "identity=2 tunnelendpoint=0.0.0.0 flags=<none>"], ["10.0.0.2/32", "identity=5 tunnelendpoint=0.0.0.0 flags=<none>"], ["10.0.1.0/24", "identity=2 tunnelendpoint=172.18.0.12 flags=<none>"], ["172.18.0.12/32", "identity=6 tunnelendpoint=0.0.0.0 flags=<none>"], ["fe80::1/128", "identity=1 tunnelendpoint=0.0.0.0 flags=<none>"]]}
{"name": "lb", "rows": [["0.0.0.0:8090/TCP (0)", ""], ["0.0.0.0:30080/TCP (0)", ""], ["198.51.100.80:0/ANY (0)", ""], ["198.51.100.80:80/TCP (0)", ""], ["198.51.100.81:80/TCP (0)", ""], ["10.96.0.7:0/ANY (0)", "0.0.0.0:0 (0) (0) [address, non-routable]"], ["10.96.0.7:80/TCP (0)", "0.0.0.0:0 (1) (0) [2 backends, non-routable]"], ["10.96.0.7:80/TCP (1)", "10.0.0.2:8080/TCP (1) (1)"], ["10.96.0.7:80/TCP (2)", "10.0.1.2:8080/TCP (1) (2)"]]}
{"name": "ct", "rows": [["TCP", "10.0.0.2:4000", "10.0.1.2:8080", "established"], ["TCP", "10.0.0.2:4001", "172.18.0.200:80", "established"]]}
{"name": "nat", "rows": [["TCP", "OUT", "10.0.0.2:4001", "->", "172.18.0.200:80", "XLATE_SRC 172.18.0.11:2000", "", "10.0.0.2:4001"]]}
{"name": "socket", "rows": [["1", "10.0.1.2:8080", "10.96.0.7:80", "1"]]}
"lxcaaaaaaaaaaaa-from_container"
"eth0-to_netdev"
"cgroup-connect4"
`

func TestLeftoversAreFoundAndNamed(t *testing.T) {
	w, err := parseWanted([]byte(objects))
	if err != nil {
		t.Fatal(err)
	}
	// n3 was there, with a pod; so was a pod c on n1
	before, err := parseWanted([]byte(strings.Replace(objects, `{"items": [`, `{"items": [
 {"kind": "Node", "metadata": {"name": "n3"}, "status": {"addresses": [{"type": "InternalIP", "address": "172.18.0.13"}]}},
 {"kind": "CiliumNode", "metadata": {"name": "n3"}, "spec": {"ipam": {"podCIDRs": ["10.0.2.0/24"]}}},
 {"kind": "Pod", "metadata": {"namespace": "demo", "name": "c"}, "spec": {"nodeName": "n1"}, "status": {"podIPs": [{"ip": "10.0.0.3"}]}},
 {"kind": "Pod", "metadata": {"namespace": "demo", "name": "d"}, "spec": {"nodeName": "n3"}, "status": {"podIPs": [{"ip": "10.0.2.5"}]}},`, 1)))
	if err != nil {
		t.Fatal(err)
	}
	h := history{}
	h.remember(before)
	h.remember(w)
	for name, c := range map[string]struct{ old, new, want string }{
		"healthy":                      {"", "", ""},
		"route of a departed node":     {`{"dst": "10.0.1.0/24"`, `{"dst": "10.0.2.0/24", "gateway": "172.18.0.13", "dev": "eth0"}, {"dst": "10.0.1.0/24"`, "n1: left: route 10.0.2.0/24 via 172.18.0.13 dev eth0 (pod CIDR of node n3)"},
		"route by another node":        {`"gateway": "172.18.0.12"`, `"gateway": "172.18.0.13"`, "n1: left: route 10.0.1.0/24 via 172.18.0.13, want via 172.18.0.12"},
		"route to a service of before": {`{"dst": "10.96.0.7"`, `{"dst": "10.96.0.8", "dev": "lash_host"}, {"dst": "10.96.0.7"`, "n1: left: route 10.96.0.8 dev lash_host: there is no such service"},
		"route to an external address": {`{"dst": "10.96.0.7"`, `{"dst": "198.51.100.80", "dev": "lash_host"}, {"dst": "10.96.0.7"`, "n1: left: route 198.51.100.80 dev lash_host: there is no such service"},
		"missing route to a service":   {`{"dst": "10.96.0.7", "dev": "lash_host"}, `, "", "n1: missing: route to service 10.96.0.7"},
		"missing route":                {`, {"dst": "10.0.1.0/24", "gateway": "172.18.0.12", "dev": "eth0"}`, "", "n1: missing: route 10.0.1.0/24"},
		"device":                       {`{"ifname": "lo"`, `{"ifname": "lxcbbbbbbbbbbbb"}, {"ifname": "lo"`, "n1: left: device lxcbbbbbbbbbbbb, of no endpoint"},
		"endpoint":                     {`"Pod": "a"`, `"Pod": "c"`, "n1: left: endpoint of pod demo/c (10.0.0.2), which is gone"},
		"pin":                          {`"eth0-to_netdev"`, `"eth1-to_netdev"`, "n1: left: pinned link eth1-to_netdev: there is no such device"},
		"row of an endpoint":           {`["10.0.0.1", "(localhost)"]`, `["10.0.0.3", "id=2"]`, "n1: left: row of bpf endpoint 10.0.0.3 (pod demo/c of node n1)"},
		"missing row":                  {`["10.0.0.2", "id=1"], `, "", "n1: missing: row of bpf endpoint 10.0.0.2, pod demo/a"},
		"row of a device":              {`["7", "lxcaaaaaaaaaaaa"`, `["7", "(gone)"`, "n1: left: row of bpf device: interface number 7, which there is not"},
		"ipcache":                      {`["10.0.0.2/32"`, `["10.0.2.0/24"`, "n1: left: row of bpf ipcache 10.0.2.0/24 (pod CIDR of node n3)"},
		"ipcache behind a node":        {`tunnelendpoint=172.18.0.12`, `tunnelendpoint=172.18.0.13`, "n1: left: row of bpf ipcache 10.0.1.0/24: behind 172.18.0.13 (node n3)"},
		"backend":                      {`"10.0.1.2:8080/TCP (1) (2)"`, `"10.0.2.5:8080/TCP (1) (2)"`, "n1: left: row of bpf lb 10.96.0.7:80/TCP (2): backend 10.0.2.5:8080 (pod demo/d of node n3)"},
		"slot of no service":           {`{"name": "lb", "rows": [`, `{"name": "lb", "rows": [["(no service) (1)", "10.0.1.2:8080/TCP (9) (1)"], `, "n1: left: row of bpf lb (no service) (1): there is no such service"},
		"host port of a gone pod":      {`0.0.0.0:8090/TCP`, `0.0.0.0:8091/TCP`, "n1: left: row of bpf lb 0.0.0.0:8091/TCP (0): there is no such service"},
		"missing host port":            {`["0.0.0.0:8090/TCP (0)", ""], `, "", "n1: missing: row of bpf lb 0.0.0.0:8090/TCP"},
		"balancer's address":           {`["198.51.100.81:80/TCP (0)", ""], `, "", "n1: missing: row of bpf lb 198.51.100.81:80/TCP"},
		"external IP of before":        {`["198.51.100.80:0/ANY (0)"`, `["198.51.100.82:0/ANY (0)"`, "n1: left: row of bpf lb 198.51.100.82:0/ANY (0): there is no such service"},
		"connection to a gone pod":     {`"10.0.1.2:8080", "established"`, `"10.0.2.5:8080", "established"`, "n1: left: row of bpf ct TCP 10.0.0.2:4000 10.0.2.5:8080 established (pod demo/d of node n3)"},
		"connection of a gone pod":     {`"10.0.0.2:4000"`, `"10.0.0.77:4000"`, "n1: left: row of bpf ct TCP 10.0.0.77:4000 10.0.1.2:8080 established (pod CIDR of node n1)"},
		"translation of a gone pod":    {`"OUT", "10.0.0.2:4001"`, `"OUT", "10.0.0.3:4001"`, "n1: left: row of bpf nat TCP OUT 10.0.0.3:4001 -> (pod demo/c of node n1)"},
		"socket":                       {`["1", "10.0.1.2:8080"`, `["1", "172.18.0.13:8080"`, "n1: left: row of bpf socket 1 172.18.0.13:8080 10.96.0.7:80 1 (node n3)"},
	} {
		text := strings.Replace(healthy, c.old, c.new, 1)
		if text == healthy && name != "healthy" {
			t.Errorf("%s: changes nothing", name)
		}
		k, err := parseKernel(strings.NewReader(text))
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		got := w.compare("n1", k, h)
		if c.want == "" && len(got) != 0 || c.want != "" && !slices.Contains(got, c.want) {
			t.Errorf("%s: got\n%s\nwant %q", name, strings.Join(got, "\n"), c.want)
		}
	}
}
