// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"bytes"
	"encoding/json"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/lash-net/lash/api/agent"
)

func TestDestinationsAreRead(t *testing.T) {
	for in, want := range map[string]struct {
		dst   string
		port  uint16
		proto string
	}{
		"d/web":                {"d/web", 0, ""},
		"d/web:80":             {"d/web", 80, ""},
		"svc/d/web:53/udp":     {"svc/d/web", 53, "udp"},
		"web.d.svc:80/tcp":     {"web.d.svc", 80, "tcp"},
		"10.0.2.7":             {"10.0.2.7", 0, ""},
		"10.0.2.7:7000/sctp":   {"10.0.2.7", 7000, "sctp"},
		"fd00::7":              {"fd00::7", 0, ""},
		"fd00::7:80":           {"fd00::7:80", 0, ""}, // an address
		"[fd00::7]":            {"fd00::7", 0, ""},
		"[fd00::7]:80/tcp":     {"fd00::7", 80, "tcp"},
		"node/worker-1:10250":  {"node/worker-1", 10250, ""},
		"pod/d/web-0:8080/tcp": {"pod/d/web-0", 8080, "tcp"},
	} {
		dst, port, proto, err := parseDst(in)
		if err != nil || dst != want.dst || port != want.port || proto != want.proto {
			t.Errorf("%s: %q %d %q, %v", in, dst, port, proto, err)
		}
	}
	for in, want := range map[string]string{"d/web:0": "no port", "d/web:http": "no port", "d/web:80/icmp": "has no port", "[fd00::7": "not closed", "d/web:70000": "no port"} {
		if _, _, _, err := parseDst(in); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", in, err, want)
		}
	}
}

// Lines are those that package monitor's golden files hold: what it prints is what is read here.
func TestEventsOfTheMonitorAreRead(t *testing.T) {
	find := func(file, what string) string {
		t.Helper()
		b, err := os.ReadFile(filepath.Join("..", "monitor", "testdata", file))
		if err != nil {
			t.Fatal(err)
		}
		for line := range strings.Lines(string(b)) {
			if strings.Contains(line, what) {
				return line
			}
		}
		t.Fatalf("%s has no line with %q", file, what)
		return ""
	}
	for _, tc := range []struct {
		line string
		want seenEvent
	}{
		{find("json.golden", `"type":"drop"`), seenEvent{proto: "tcp", device: "12", reason: "Policy denied", where: "pod.c:123"}},
		{find("brief.golden", "xx drop"), seenEvent{proto: "tcp", device: "lxc6cb888bb2750", reason: "Policy denied", where: "pod.c:123"}},
		{find("brief.golden", "-> network"), seenEvent{proto: "tcp"}},
		{"10.244.1.235:54590 -> 10.244.2.251:7000 tcp", seenEvent{proto: "tcp"}},
	} {
		tc.want.src, tc.want.dst = netip.MustParseAddrPort("10.244.1.235:54590"), netip.MustParseAddrPort("10.244.2.251:7000")
		if got, err := parseEvent(tc.line); err != nil || got != tc.want {
			t.Errorf("%s: %+v, %v", tc.line, got, err)
		}
	}
	got, err := parseEvent(find("json.golden", "EchoRequest"))
	if err != nil || got.proto != "icmp" || got.id != 278 || got.src.Port() != 0 {
		t.Errorf("echo: %+v, %v", got, err)
	}
	if got, err := parseEvent(find("json.golden", `"origIP":"::"`)); err != nil || got.src.String() != "[fd00::1:a]:7000" {
		t.Errorf("IPv6: %+v, %v", got, err)
	}
	for _, line := range []string{find("json.golden", `"type":"lost"`), "nothing", "{", `{"type":"agent"}`} {
		if got, err := parseEvent(line); err == nil {
			t.Errorf("%s: %+v", line, got)
		}
	}
}

// testWay is a packet from a pod to one of another node.
func testWay() agent.ExplainedWay {
	a, b := netip.MustParseAddr("10.0.1.5"), netip.MustParseAddr("10.0.2.7")
	return agent.ExplainedWay{
		Src: agent.ExplainedEnd{Addr: a, Object: "pod demo/client", Node: "n1"}, Dst: agent.ExplainedEnd{Addr: b, Object: "pod demo/web", Node: "n2"},
		Steps: []agent.ExplainStep{{
			Node: "n1", Program: "from_container", Device: "lxc0123456789ab", Tag: "fc1e7cfe4e021bb9", Packet: "10.0.1.5:50000 -> 10.0.2.7:80 tcp SYN", Why: []string{"Slow path: new connection"},
			Entries: []agent.ExplainEntry{
				{Map: "lash_ifaces", Key: "lxc0123456789ab", Value: "identity 2001 (k8s:app=client)", Object: "pod demo/client"},
				{Map: "lash_conn", Key: "10.0.1.5:50000 > 10.0.2.7:80", Value: "no record: a new connection"},
				{Map: "lash_ipcache", Key: "10.0.2.7/32", Value: "identity 2002 (k8s:app=web), at 172.18.0.12 (node n2), by the tunnel", Object: "pod demo/web", Decides: true},
			},
			Record: &agent.ExplainRecord{Connection: "10.0.1.5:50000 > 10.0.2.7:80 tcp", State: "new, expires in 60 s", Forth: "by the tunnel to 172.18.0.12, VNI 2001, from demo/client", Back: "into pod demo/client, from the tunnel"},
			Points: []string{"to-overlay, new, identity 2001 -> 2002"}, Result: "encapsulated to node n2 (172.18.0.12) with VNI 2001, from 172.18.0.11, 172.18.0.0/16 dev eth0",
		}, {
			Node: "n2", Program: "from_overlay", Device: "lash_vxlan", Packet: "10.0.1.5:50000 -> 10.0.2.7:80 tcp SYN", Entries: []agent.ExplainEntry{{Map: "lash_endpoints", Key: "10.0.2.7", Value: "no row", Decides: true}},
			Changes: []string{"TTL 64 -> 63"}, Result: "dropped: Stale or unroutable IP (overlay.c:51)",
		}},
		Verdict: agent.ExplainVerdict{Outcome: agent.OutcomeDropped, Node: "n2", Reason: "Stale or unroutable IP", File: "overlay.c", Line: 51, Text: "dropped on node n2 by from_overlay: Stale or unroutable IP (overlay.c:51)", Remedy: "nobody has the address any more"},
	}
}

func TestExplainIsForPeople(t *testing.T) {
	var b bytes.Buffer
	for _, verbose := range []bool{false, true} {
		if err := printWay(&b, testWay(), verbose); err != nil {
			t.Fatal(err)
		}
		b.WriteString("\n")
	}
	path := filepath.Join("testdata", "explain.golden")
	if *update {
		if err := os.WriteFile(path, b.Bytes(), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if b.String() != string(want) {
		t.Errorf("got:\n%s\nwant:\n%s", b.String(), want)
	}
}

// What is asked of the agent is what the command line says.
func TestExplainAsksTheAgent(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	var asked agent.ExplainRequest
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		asked = agent.ExplainRequest{}
		if err := json.NewDecoder(r.Body).Decode(&asked); err != nil || r.URL.Path != "/v1/explain" || r.Method != http.MethodPost {
			t.Error(r.Method, r.URL, err)
		}
		if asked.Src == "d/nobody" {
			w.WriteHeader(http.StatusUnprocessableEntity)
			_ = json.NewEncoder(w).Encode(agent.Error{Error: "source: no such pod"})
			return
		}
		_ = json.NewEncoder(w).Encode(agent.Explanation{Ways: []agent.ExplainedWay{testWay()}})
	})}
	go srv.Serve(l)
	t.Cleanup(func() { srv.Close() })
	run := func(in string, args ...string) (string, string, int) {
		var out, errs bytes.Buffer
		code := Main(t.Context(), append([]string{"--socket", socket, "explain"}, args...), Streams{In: strings.NewReader(in), Out: &out, Err: &errs})
		return out.String(), errs.String(), code
	}
	out, errs, code := run("", "d/a", "svc/d/web:80/tcp", "-6", "--source-port", "7", "--source-ip", "fd00::9", "--ttl", "1", "--all", "--at", "n2", "--size", "9")
	want := agent.ExplainRequest{Src: "d/a", Dst: "svc/d/web", Port: 80, Proto: "tcp", Family: 6, SourcePort: 7, SourceIP: netip.MustParseAddr("fd00::9"), TTL: 1, All: true, Node: "n2", Size: 9}
	if code != 0 || asked != want || !strings.Contains(out, "Verdict:") {
		t.Errorf("%d %s asked %+v, want %+v", code, errs, asked, want)
	}
	const event = "xx drop (Stale or unroutable IP) flow 0x1 to endpoint 0, ifindex lxc1, file pod.c:9, , identity 1->2: 10.0.1.5:40000 -> 10.0.2.7:80 tcp SYN"
	out, errs, code = run(event+"\n", "--from-event", "-")
	want = agent.ExplainRequest{Src: "10.0.1.5", Dst: "10.0.2.7", Port: 80, Proto: "tcp", SourcePort: 40000, Device: "lxc1", TTL: 64}
	if code != 0 || asked != want || !strings.Contains(out, "the same would happen now") {
		t.Errorf("%d %s asked %+v, want %+v\n%s", code, errs, asked, want, out)
	}
	if out, _, _ := run("", "--from-event", strings.Replace(event, "Stale or unroutable IP", "Invalid packet", 1)); !strings.Contains(out, "would not happen") {
		t.Errorf("another reason: %s", out)
	}
	if out, _, code := run("", "d/a", "d/b", "-o", "json"); code != 0 || json.Unmarshal([]byte(out), &agent.Explanation{}) != nil {
		t.Errorf("-o json: %d %s", code, out)
	}
	for _, tc := range []struct {
		want string
		args []string
	}{
		{"no such pod", []string{"d/nobody", "d/a"}}, {"both ends", []string{"d/a"}}, {"leave out SRC", []string{"d/a", "d/b", "--from-event", event}},
		{"--source-ip=x", []string{"d/a", "d/b", "--source-ip", "x"}}, {"--ttl=0", []string{"d/a", "d/b", "--ttl", "0"}}, {"names no packet", []string{"--from-event", "hello"}}, {"ipv4", []string{"d/a", "d/b", "-4", "-6"}},
	} {
		if _, errs, code := run("", tc.args...); code == 0 || !strings.Contains(errs, tc.want) {
			t.Errorf("%q: %d %s, want %q", tc.args, code, errs, tc.want)
		}
	}
}
