// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"bytes"
	"encoding/json"
	"flag"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spf13/pflag"

	"github.com/lash-net/lash/api/agent"
	"github.com/lash-net/lash/internal/model"
	"github.com/lash-net/lash/internal/server"
)

var update = flag.Bool("update", false, "write the golden files")

var now = time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)

func testStatus() agent.Status {
	ago := func(d time.Duration) *time.Time { t := now.Add(-d); return &t }
	disabled := agent.Component{State: agent.StateDisabled}
	eth0 := agent.Device{Name: "eth0", Ifindex: 2, MTU: 1500, IPv4: netip.MustParseAddr("172.18.0.11"), DirectRouting: true,
		Addrs: []netip.Prefix{netip.MustParsePrefix("172.18.0.11/24")}, Reason: "node address 172.18.0.11"}
	return agent.Status{
		Node: "n1", Ready: true, Now: now, KVStore: disabled,
		Kubernetes:           agent.Component{State: "Ok", Message: "1.34 (v1.34.4) [linux/amd64]"},
		KubernetesAPIs:       []string{"cilium/v2::CiliumNode", "core/v1::Pods"},
		KubeProxyReplacement: agent.KubeProxyReplacement{Mode: "True", Devices: []agent.Device{eth0}, SocketLB: "Enabled", XDPAcceleration: "Best-Effort", NotAccelerated: map[string]string{"eth1": "its driver (bridge) has no native XDP"}, Services: []agent.ServiceFeature{{Name: "ClusterIP", State: "Enabled"}, {Name: "NodePort", State: "Disabled", Note: "not in this version"}}},
		HostFirewall:         disabled, SRv6: disabled, CNIChaining: "none", CNIConfigFile: "successfully wrote CNI configuration file to /etc/cni/net.d/05-lash.conflist",
		Lash: agent.Component{State: "Ok", Message: "0.1.0 (v0.1.0-abcdef01)"}, NodeMonitor: disabled, HealthDaemon: disabled,
		IPAM: agent.IPAM{Mode: "cluster-pool", Pools: []agent.Pool{{Family: "IPv4", Allocated: 4, Total: 254, CIDRs: []netip.Prefix{netip.MustParsePrefix("10.244.1.0/24")}}},
			Allocations: []agent.Allocation{{Addr: netip.MustParseAddr("10.244.1.70"), Owner: "router"}}},
		IPv4BigTCP: disabled, IPv6BigTCP: disabled, BandwidthManager: disabled,
		Routing: agent.Routing{Network: "Native", Host: "BPF"}, AttachMode: "TCX", DeviceMode: "veth",
		Masquerading: agent.Masquerading{Mode: "BPF", Devices: []string{"eth0"}, Excluded: []string{"10.244.0.0/16"}, IPv4: true}, ClockSource: "jiffies",
		Controllers: []agent.Controller{
			{Name: "node-routes", LastSuccess: ago(14 * time.Second), Message: "no error"},
			{Name: "local-node", LastError: ago(3 * time.Second), Count: 2, Message: "refused"},
		},
		Sockmap: agent.Sockmap{Pods: 2, Messages: 400, Bytes: 3 << 20, Bulk: 1},
		Proxy:   disabled, IdentityRange: agent.IdentityRange{Min: 256, Max: 65535}, Hubble: disabled, Encryption: disabled,
		BPFMaps:       []agent.BPFMap{{Name: "lash_conn", Size: 524288, Entries: -1, Memory: 8 << 20}},
		ClusterHealth: agent.ClusterHealth{State: "Ok", Reachable: 2, Total: 3, At: now},
		ManagedPods:   agent.ManagedPods{Managed: 2, Total: 3, Unmanaged: []string{"default/old"}},
		Devices:       []agent.Device{eth0}, MTU: agent.MTU{Device: 1500, Route: 1500, Reason: "smallest of the devices"},
		Warnings: []string{"node n3 is not on the same link"},
		Objects:  []agent.BadObject{{Kind: "CiliumNode", Name: "n4", Field: "spec.addresses[0].ip", Error: "is not an address"}},
		Why:      []agent.Requirement{{Requirement: "services in BPF", Met: true, Found: "true", Needed: "true", SetBy: "default"}},
	}
}

// The line as the field's users know it.
func TestMasqueradingLine(t *testing.T) {
	for _, tt := range []struct {
		m    agent.Masquerading
		want string
	}{
		{agent.Masquerading{Mode: "Disabled"}, "Masquerading Disabled"},
		{agent.Masquerading{Mode: "IPTables", Devices: []string{"eth0"}, Excluded: []string{"10.0.0.0/8"}, IPv4: true, IPv6: true}, "Masquerading IPTables [IPv4: Enabled, IPv6: Enabled]"},
		{agent.Masquerading{Mode: "IPTables", IPv4: true}, "Masquerading IPTables [IPv4: Enabled, IPv6: Disabled]"},
		{agent.Masquerading{Mode: "BPF", Devices: []string{"ens33"}, Excluded: []string{"10.0.0.0/16"}, IPv4: true}, "Masquerading BPF [ens33] 10.0.0.0/16  [IPv4: Enabled, IPv6: Disabled]"},
		{agent.Masquerading{Mode: "BPF (ip-masq-agent)", Devices: []string{"eth0", "eth1"}, Excluded: []string{"10.0.0.0/8", "fd00::/104"}, IPv4: true, IPv6: true},
			"Masquerading BPF (ip-masq-agent) [eth0, eth1] 10.0.0.0/8 fd00::/104 [IPv4: Enabled, IPv6: Enabled]"},
	} {
		got := ""
		masquerading(func(label string, cells ...string) { got = strings.Join(append([]string{label}, cells...), " ") }, tt.m)
		if got != tt.want {
			t.Errorf("got  %s\nwant %s", got, tt.want)
		}
	}
}

func TestPrintedForms(t *testing.T) {
	s, legacy := testStatus(), testStatus()
	legacy.Routing = agent.Routing{Network: "Native", Host: "Legacy", Reason: "BPF host routing requires enable-bpf-masquerade"}
	legacy.Ready, legacy.NotReady, legacy.Masquerading = false, "the API server", agent.Masquerading{Mode: "Disabled"}
	addr := netip.MustParseAddr
	for name, print := range map[string]func(*bytes.Buffer){
		"status":         func(b *bytes.Buffer) { printStatus(b, &s, false) },
		"status-verbose": func(b *bytes.Buffer) { printStatus(b, &s, true) },
		"status-legacy":  func(b *bytes.Buffer) { printStatus(b, &legacy, false) },
		"status-why":     func(b *bytes.Buffer) { printWhy(b, &s) },
		"endpoints": func(b *bytes.Buffer) {
			printEndpoints(b, []model.Endpoint{
				{ID: 1066, Identity: 28568, IPv4: addr("10.244.1.174"), IPv6: addr("fd00::2"), State: "ready", Labels: map[string]string{"k8s:app": "server", "io.kubernetes.pod.namespace": "default"}},
				{ID: 902, Identity: 1, State: "ready"},
			})
		},
		"ips": func(b *bytes.Buffer) {
			printIPs(b, []agent.IP{{Prefix: netip.MustParsePrefix("10.244.1.70/32"), Identity: 1, Source: "node"},
				{Prefix: netip.MustParsePrefix("172.18.0.1/32"), Labels: []string{"reserved:kube-apiserver", "reserved:world"}}})
		},
		"identities": func(b *bytes.Buffer) {
			printIdentities(b, []agent.Identity{{ID: 1, Labels: []string{"reserved:host"}}, {ID: 7, Labels: []string{"reserved:kube-apiserver", "reserved:remote-node"}},
				{ID: 28568, Labels: []string{"k8s:app=server", "k8s:io.kubernetes.pod.namespace=default"}}, {ID: 16777217, Labels: []string{"reserved:kube-apiserver", "reserved:world"}}})
		},
		"nodes": func(b *bytes.Buffer) {
			printNodes(b, []model.Node{
				{Name: "lab/nodeb", Addrs: []netip.Addr{addr("172.18.0.12")}, PodCIDRs: []netip.Prefix{netip.MustParsePrefix("10.244.2.0/24")}, Source: "custom-resource"},
				{Name: "lab/nodea", Addrs: []netip.Addr{addr("172.18.0.11"), addr("fd00:172:18::11")}, PodCIDRs: []netip.Prefix{netip.MustParsePrefix("10.244.1.0/24"), netip.MustParsePrefix("fd00::/120")}, Local: true},
			})
		},
		"services": func(b *bytes.Buffer) {
			printServices(b, []agent.Service{
				{ID: 2, Frontend: "10.96.0.10:53/UDP", Type: "ClusterIP", Backends: []agent.Backend{{Addr: addr("10.0.1.2"), Port: 53, Proto: 17, State: "active"}, {Addr: addr("10.0.1.3"), Port: 53, Proto: 17, State: "terminating"}}},
				{ID: 1, Frontend: "10.96.0.1:443/TCP", Type: "ClusterIP"},
			})
		},
	} {
		t.Run(name, func(t *testing.T) {
			var b bytes.Buffer
			print(&b)
			path := filepath.Join("testdata", name+".golden")
			if *update {
				if err := os.MkdirAll("testdata", 0o755); err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(path, b.Bytes(), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			if b.String() != string(want) {
				t.Errorf("printed\n%s\nwant\n%s", b.String(), want)
			}
		})
	}
}

// TestStatusLinesAreInTheOrderUsersKnow is independent of the golden files: nobody updates it by accident.
func TestStatusLinesAreInTheOrderUsersKnow(t *testing.T) {
	s := testStatus()
	var b bytes.Buffer
	printStatus(&b, &s, false)
	at := 0
	for _, label := range []string{"KVStore:", "Kubernetes:", "Kubernetes APIs:", "KubeProxyReplacement:", "Host firewall:", "SRv6:", "CNI Chaining:", "CNI Config file:", "Lash:",
		"NodeMonitor:", "Lash health daemon:", "IPAM:", "IPv4 BIG TCP:", "IPv6 BIG TCP:", "BandwidthManager:", "Host Routing:", "\nRouting:", "Attach Mode:", "Device Mode:", "Masquerading:",
		"Controller Status:", "Proxy Status:", "Global Identity Range:", "Hubble:", "Encryption:", "Cluster health:"} {
		i := strings.Index(b.String()[at:], label)
		if i < 0 {
			t.Fatalf("%q is missing after %q in\n%s", label, b.String()[:at], b.String())
		}
		at += i
	}
}

// serve answers on a unix socket as an agent would and returns its path.
func serve(t *testing.T, answers map[string]any) string {
	t.Helper()
	socket := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		v, ok := answers[r.URL.RequestURI()]
		if !ok {
			w.WriteHeader(http.StatusNotFound)
			v = agent.Error{Error: "no such thing: " + r.URL.RequestURI()}
		}
		if err := json.NewEncoder(w).Encode(v); err != nil {
			t.Error(err)
		}
	})}
	go srv.Serve(l)
	t.Cleanup(func() { srv.Close() })
	return socket
}

func run(t *testing.T, args ...string) (code int, out, errOut string) {
	t.Helper()
	var o, e bytes.Buffer
	code = Main(t.Context(), args, Streams{In: strings.NewReader(""), Out: &o, Err: &e})
	return code, o.String(), e.String()
}

func TestCommandsAskTheSocket(t *testing.T) {
	ready, waiting := testStatus(), testStatus()
	waiting.Ready, waiting.NotReady = false, "no pod CIDR"
	table := agent.Table{Name: "routes", Columns: []string{"Destination", "Device"}, Rows: [][]string{{"10.0.0.0/24", "eth0"}}}
	socket := serve(t, map[string]any{
		"/v1/status": ready, "/v1/status?why": ready, "/v1/status?nodes": ready, "/v1/health": referenceHealth(), "/v1/endpoints": []model.Endpoint{{ID: 7, State: "ready"}}, "/v1/endpoints/7": model.Endpoint{ID: 7},
		"/v1/ip": []agent.IP{}, "/v1/nodes": []model.Node{}, "/v1/services": []agent.Service{}, "/v1/db": []agent.TableInfo{{Name: "routes", Rows: 1, Complete: true}}, "/v1/db/routes": table,
		"/v1/bpf/net": table, "/v1/bpf/endpoint": table, "/v1/bpf/ct": table, "/v1/bpf/ipcache": table, "/v1/bpf/lb": table, "/v1/bpf/nat": table, "/v1/bpf/device": table, "/v1/bpf/socket": table, "/v1/bpf/metrics": table,
		"/v1/version": agent.Version{Version: "0.1.0", Kernel: "6.1"},
	})
	for args, want := range map[string]string{
		"status": "Host Routing:", "status --brief": "OK", "status --why": "services in BPF", "status --verbose": "BPF Maps:", "status -o json": `"node": "n1"`,
		"health status": "(Probe interval: 1m36.566274746s)", "health status --succinct": "lab/nodea (localhost)", "health status -o json": `"reachable": 2`, "health get": "Endpoint connectivity to 10.244.1.193:",
		"health get nodea -o json": `"Name": "nodea"`, "endpoint list": "ENDPOINT", "endpoint get 7": `"ID": 7`, "endpoint list -o json": `"State": "ready"`, "ip list": "IDENTITY", "node list": "Endpoint CIDR", "service list": "Frontend",
		"bpf net list": "eth0", "bpf endpoint list": "eth0", "bpf ct list": "eth0", "bpf ipcache list": "eth0", "bpf lb list": "eth0", "bpf nat list": "eth0", "bpf device list": "eth0", "bpf socket list": "eth0", "bpf metrics list": "eth0",
		"bpf ct list -o json": `"columns"`, "db list": "routes   1      true", "db show routes": "10.0.0.0/24   eth0", "version": "kernel 6.1", "version --client": "Client:",
	} {
		code, out, errOut := run(t, append(strings.Fields(args), "--socket", socket)...)
		if code != 0 || !strings.Contains(out, want) {
			t.Errorf("lash %s: status %d, %q, %q lacks %q", args, code, errOut, out, want)
		}
	}
	for args, want := range map[string]string{
		"endpoint get 8": "no such thing", "endpoint get x": "must be a number from 1 to 65535", "endpoint get 0": "must be a number", "endpoint get": "accepts 1 arg(s)",
		"db show a/b": "must be one of those 'lash db list' shows", "db show none": "no such thing", "status -o yaml": "must be json", "status --why --brief": "none of the others can be",
		"bpf foo": "it has ct, device, endpoint", "sttus": "Did you mean this?\n\tstatus", "status --wyh": "unknown flag: --wyh; 'lash status --help'", "status extra": "unknown command",
		"upgrade --version 9.9": "brings version 0.1.0", "install --set tunnel=gre": "must be disabled, vxlan or geneve", "install --set a=1": "unknown value", "install -f /none.yaml": "/none.yaml",
		"status --kubeconfig /none": "--kubeconfig: stat /none",
	} {
		code, _, errOut := run(t, append(strings.Fields(args), "--socket", socket)...)
		if code != 1 || !strings.Contains(errOut, want) {
			t.Errorf("lash %s: status %d, %q lacks %q", args, code, errOut, want)
		}
	}
	socket = serve(t, map[string]any{"/v1/status": waiting})
	if code, out, _ := run(t, "status", "--brief", "--socket", socket); code != 1 || out != "not ready: no pod CIDR\n" {
		t.Errorf("status %d, %q", code, out)
	}
}

func TestAnAgentThatIsGoneIsNamed(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	l.(*net.UnixListener).SetUnlinkOnClose(false)
	l.Close()
	if code, _, errOut := run(t, "status", "--socket", socket); code != 1 || !strings.Contains(errOut, "the agent is not running (nothing listens on "+socket+")") {
		t.Errorf("status %d, %q", code, errOut)
	}
	if code, _, errOut := run(t, "status", "--socket", socket+"x"); code != 1 || !strings.Contains(errOut, "is the agent running on this machine?") {
		t.Errorf("status %d, %q", code, errOut)
	}
}

// TestRemoteArgumentsDropWhatSaysWhere checks the command line that is run in the agent's pod.
func TestRemoteArgumentsDropWhatSaysWhere(t *testing.T) {
	root := newRoot(Streams{Out: &bytes.Buffer{}, Err: &bytes.Buffer{}})
	for line, want := range map[string]string{
		"status --verbose --node n1 --context x -n kube-system --kubeconfig=/k": "status --verbose=true",
		"status --wait --wait-duration 3s -o json":                              "status --output=json",
		"endpoint get 7 --node n1":                                              "endpoint get 7",
		"bpf ct list -o json --node n1":                                         "bpf ct list --output=json",
		"monitor -vv --type drop,trace --related-to 7 --related-to 8 --node n1": "monitor --related-to=7 --related-to=8 --type=drop --type=trace --verbose=2",
	} {
		cmd, rest, err := root.Find(strings.Fields(line))
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.ParseFlags(rest); err != nil {
			t.Fatal(err)
		}
		if got := strings.Join(remoteArgs(cmd, cmd.Flags().Args()), " "); got != want {
			t.Errorf("%s: %q, want %q", line, got, want)
		}
		root = newRoot(Streams{Out: &bytes.Buffer{}, Err: &bytes.Buffer{}})
	}
}

func TestEveryCommandHasHelp(t *testing.T) {
	if code, out, _ := run(t, "completion", "bash"); code != 0 || len(out) < 1000 {
		t.Error("no completion for bash")
	}
	for _, args := range []string{"", "install", "upgrade", "uninstall", "status", "endpoint", "endpoint get", "bpf ct list", "db show", "version"} {
		code, out, errOut := run(t, append(strings.Fields(args), "--help")...)
		if code != 0 || !strings.Contains(out, "Usage:") {
			t.Errorf("lash %s --help: %d, %q", args, code, errOut)
		}
	}
	if code, out, _ := run(t, "install", "--show-values"); code != 0 || !strings.Contains(out, "kubeProxyReplacement: true") {
		t.Error("install --show-values shows no values")
	}
}

// What the commands ask for, the agent has.
func TestEveryTableOfTheCommandsIsServed(t *testing.T) {
	a := &app{}
	for _, c := range a.bpfCommand().Commands() {
		list := c.Commands()[0]
		names := []string{c.Name()}
		list.Flags().VisitAll(func(f *pflag.Flag) {
			if f.Value.Type() == "bool" {
				names = append(names, c.Name()+"-"+f.Name)
			}
		})
		for _, name := range names {
			if !slices.Contains(server.Dumps, name) && name != c.Name()+"-help" {
				t.Errorf("lash bpf %s: the agent serves no table %q", c.Name(), name)
			}
		}
	}
}
