// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	api "github.com/lash-net/lash/api/agent"
	"github.com/lash-net/lash/internal/testutil"
)

// TestMain lets the tests execute this binary as the agent.
func TestMain(m *testing.M) {
	if os.Getenv("LASH_TEST_AGENT") != "" {
		main()
		return
	}
	os.Exit(m.Run())
}

// startAgent executes the real agent in a network and a mount namespace of its own, with an API server that does not
// answer: it decides, says so and waits. It returns the log of that time, and the status.
func startAgent(t *testing.T, flags ...string) (log []string, status api.Status) {
	t.Helper()
	dir, err := os.MkdirTemp("", "lash") // t.TempDir is too long for a socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	path := func(name string) string { return filepath.Join(dir, name) }
	kubeconfig := `{apiVersion: v1, kind: Config, clusters: [{name: c, cluster: {server: "http://127.0.0.1:1"}}], users: [{name: u, user: {}}],
contexts: [{name: x, context: {cluster: c, user: u}}], current-context: x}`
	if err := os.WriteFile(path("kubeconfig"), []byte(kubeconfig), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("/proc/self/exe", append([]string{
		"--k8s-kubeconfig-path=" + path("kubeconfig"), "--socket-path=" + path("lash.sock"), "--cni-socket-path=" + path("cni.sock"), "--state-dir=" + path("state"),
		"--bpf-root=" + path("bpf"), "--cni-conf-dir=" + path("net.d"), "--cni-bin-dir=" + path("bin"), "--enable-ipv6=true", "--ipam=kubernetes",
	}, flags...)...)
	cmd.Env = append(os.Environ(), "LASH_TEST_AGENT=1", "K8S_NODE_NAME=n1")
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Unshareflags: unix.CLONE_NEWNET | unix.CLONE_NEWNS}
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	cmd.Stderr = w
	err = cmd.Start()
	w.Close()
	if err != nil {
		t.Fatal(err)
	}
	defer cmd.Wait()
	defer cmd.Process.Kill()
	client := http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", path("lash.sock"))
	}}}
	r.SetReadDeadline(time.Now().Add(20 * time.Second))
	lines := bufio.NewScanner(r)
	for lines.Scan() {
		log = append(log, lines.Text())
		resp, err := client.Get("http://agent/v1/status?why")
		if err != nil {
			continue // not listening yet
		}
		defer resp.Body.Close()
		body, err := io.ReadAll(resp.Body)
		if err != nil {
			t.Fatal(err)
		}
		if err := json.Unmarshal(body, &status); err != nil {
			t.Fatalf("%v\n%s", err, body)
		}
		cmd.Process.Kill()
		for lines.Scan() {
			log = append(log, lines.Text())
		}
		return log, status
	}
	t.Fatalf("no status: %v\n%s", lines.Err(), strings.Join(log, "\n"))
	return nil, status
}

// The real agent with each requirement of BPF host routing unmet that configuration can leave unmet; what a kernel can
// lack is TestHostRouting's in package node.
func TestAgentFallsBackToLegacyAndSaysWhy(t *testing.T) {
	testutil.NeedRoot(t)
	const back = " Falling back to legacy host routing (enable-host-legacy-routing=true)."
	for _, tc := range []struct {
		flags  []string
		reason string
		lines  []string
	}{
		{nil, "", nil},
		{[]string{"--routing-mode=native"}, "", nil},
		{[]string{"--routing-mode=hybrid", "--tunnel-protocol=geneve"}, "", nil},
		{[]string{"--routing-mode=native", "--enable-host-legacy-routing=true"}, "enable-host-legacy-routing=true", []string{"BPF host routing is switched off by the user (enable-host-legacy-routing=true)."}},
		{[]string{"--enable-host-legacy-routing=true"}, "enable-host-legacy-routing=true", []string{"BPF host routing is switched off by the user (enable-host-legacy-routing=true)."}},
		{[]string{"--enable-bpf-masquerade=false"}, "enable-bpf-masquerade=false", []string{"BPF host routing requires enable-bpf-masquerade." + back}},
		{[]string{"--enable-bpf-masquerade=false", "--enable-ipv4-masquerade=false", "--enable-ipv6-masquerade=false"}, "", nil},
		{[]string{"--kube-proxy-replacement=false"}, "kube-proxy-replacement=false", []string{"BPF host routing requires kube-proxy-replacement." + back}},
		{[]string{"--kube-proxy-replacement=false", "--enable-bpf-masquerade=false"}, "kube-proxy-replacement=false; enable-bpf-masquerade=false",
			[]string{"BPF host routing requires kube-proxy-replacement." + back, "BPF host routing requires enable-bpf-masquerade." + back}},
	} {
		t.Run(strings.Join(append([]string{"agent"}, tc.flags...), " "), func(t *testing.T) {
			log, status := startAgent(t, tc.flags...)
			want := api.Routing{Network: "Tunnel [vxlan]", Host: "BPF"}
			if slices.Contains(tc.flags, "--routing-mode=native") {
				want.Network = "Native"
			} else if slices.Contains(tc.flags, "--routing-mode=hybrid") {
				want.Network = "Hybrid [geneve]"
			}
			if tc.reason != "" {
				want.Host, want.Reason = "Legacy", tc.reason
			}
			if status.Routing != want {
				t.Errorf("status says %+v, want %+v", status.Routing, want)
			}
			mode := map[bool]string{true: "BPF", false: "IPTables"}[!slices.Contains(tc.flags, "--enable-bpf-masquerade=false")]
			if slices.Contains(tc.flags, "--enable-ipv4-masquerade=false") {
				mode = "Disabled"
			}
			if status.Masquerading.Mode != mode {
				t.Errorf("masquerading is %+v, want %s", status.Masquerading, mode)
			}
			unmet := 0
			for _, r := range status.Why {
				if !r.Met {
					unmet++
				}
			}
			if len(status.Why) == 0 || unmet != len(tc.lines) {
				t.Errorf("%d of %d requirements are unmet, want %d: %+v", unmet, len(status.Why), len(tc.lines), status.Why)
			}
			text := strings.Join(log, "\n")
			dumped := fmt.Sprintf(`level=info msg="  --enable-host-legacy-routing='%v'" subsys=daemon`, slices.Contains(tc.flags, "--enable-host-legacy-routing=true"))
			if !strings.Contains(text, dumped) {
				t.Errorf("the log lacks %s:\n%s", dumped, text)
			}
			for _, line := range tc.lines {
				if line := fmt.Sprintf("level=info msg=%q subsys=daemon", line); !strings.Contains(text, line) {
					t.Errorf("the log lacks %s:\n%s", line, text)
				}
			}
			if n := strings.Count(text, "BPF host routing"); n != len(tc.lines) {
				t.Errorf("%d lines about host routing, want %d:\n%s", n, len(tc.lines), text)
			}
		})
	}
}
