// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/lash-net/lash/internal/bench"
)

const (
	nodeName   = "bench-node"
	healthPort = 9879
)

// node is a network namespace in which a real agent runs against apiServer, with
// folders of its own for everything that an agent writes.
type node struct {
	*bench.Node
	dir    string
	agent  string // binary
	plugin string
	cgroup string
	api    string // URL
	log    *os.File
	health http.Client
}

func (n *node) path(name string) string { return filepath.Join(n.dir, name) }

// prepare makes the folders, the kubeconfig and the child control group.
func (n *node) prepare() error {
	for _, d := range []string{"state", "net.d", "cni-bin"} {
		if err := os.MkdirAll(n.path(d), 0o755); err != nil {
			return err
		}
	}
	kubeconfig := fmt.Sprintf(`apiVersion: v1
kind: Config
clusters: [{name: bench, cluster: {server: %q}}]
users: [{name: bench, user: {}}]
contexts: [{name: bench, context: {cluster: bench, user: bench}}]
current-context: bench
`, n.api)
	if err := os.WriteFile(n.path("kubeconfig"), []byte(kubeconfig), 0o600); err != nil {
		return err
	}
	root, err := cgroup2()
	if err != nil {
		return err
	}
	n.cgroup = filepath.Join(root, fmt.Sprintf("lash-bench-%d", os.Getpid()))
	if err := os.Mkdir(n.cgroup, 0o755); err != nil {
		return fmt.Errorf("child control group for the socket programs: %w", err)
	}
	if n.log, err = os.Create(n.path("agent.log")); err != nil {
		return err
	}
	// Connections to /healthz are made in the node's namespace.
	n.health = http.Client{Timeout: time.Second, Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, network, addr string) (c net.Conn, err error) {
			err = n.Do(func() (err error) {
				c, err = (&net.Dialer{}).DialContext(ctx, network, addr)
				return err
			})
			return c, err
		},
	}}
	return nil
}

func (n *node) cleanUp() {
	if n.cgroup != "" {
		os.Remove(n.cgroup)
	}
	if n.log != nil {
		n.log.Close()
	}
}

// cgroup2 is where the unified hierarchy is mounted, on hybrid hosts too.
func cgroup2() (string, error) {
	text, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		return "", err
	}
	for line := range strings.Lines(string(text)) {
		if f := strings.Fields(line); len(f) > 2 && f[2] == "cgroup2" {
			return f[1], nil
		}
	}
	return "", fmt.Errorf("no cgroup2 hierarchy is mounted here")
}

// agent is a running agent.
type agent struct {
	cmd   *exec.Cmd
	Ready time.Duration // from execution until /healthz said so
	ended chan struct{}
}

// start runs an agent and waits until it is ready.
func (n *node) start(ctx context.Context) (*agent, error) {
	cmd := exec.Command(n.agent,
		"--k8s-kubeconfig-path="+n.path("kubeconfig"), "--ipam=kubernetes", "--enable-ipv6=true", "--bpf-root=/sys/fs/bpf", "--cgroup-root="+n.cgroup,
		"--routing-mode=native", "--ipv4-native-routing-cidr=10.76.0.0/16", "--ipv6-native-routing-cidr=fd00:76::/32", "--auto-direct-node-routes=true",
		"--cni-conf-dir="+n.path("net.d"), "--cni-bin-dir="+n.path("cni-bin"), "--cni-socket-path="+n.path("cni.sock"),
		"--socket-path="+n.path("lash.sock"), "--state-dir="+n.path("state"), fmt.Sprintf("--agent-health-port=%d", healthPort))
	cmd.Env = append(os.Environ(), "K8S_NODE_NAME="+nodeName)
	cmd.Stdout, cmd.Stderr = n.log, n.log
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setpgid: true}
	begin := time.Now()
	if err := n.Do(cmd.Start); err != nil {
		return nil, fmt.Errorf("start %s: %w", n.agent, err)
	}
	a := &agent{cmd: cmd, ended: make(chan struct{})}
	go func() { cmd.Wait(); close(a.ended) }()
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	limit := time.After(30 * time.Second)
	answer := "no answer"
	for {
		select {
		case <-ctx.Done():
			a.kill()
			return nil, ctx.Err()
		case <-a.ended:
			return nil, fmt.Errorf("the agent ended: %s\n%s", cmd.ProcessState, n.logTail())
		case <-limit:
			a.kill()
			return nil, fmt.Errorf("the agent is not ready after 30 s (/healthz: %s)\n%s", answer, n.logTail())
		case <-tick.C:
		}
		r, err := n.health.Get(fmt.Sprintf("http://127.0.0.1:%d/healthz", healthPort))
		if err != nil {
			continue
		}
		var b bytes.Buffer
		b.ReadFrom(r.Body)
		r.Body.Close()
		if r.StatusCode == http.StatusOK {
			a.Ready = time.Since(begin)
			return a, nil
		}
		answer = r.Status + " " + strings.TrimSpace(b.String())
	}
}

func (n *node) logTail() string {
	text, _ := os.ReadFile(n.path("agent.log"))
	lines := strings.Split(strings.TrimSpace(string(text)), "\n")
	return strings.Join(lines[max(0, len(lines)-15):], "\n")
}

func (a *agent) kill() {
	a.cmd.Process.Kill()
	<-a.ended
}

// Memory is VmRSS and VmHWM, bytes.
func (a *agent) Memory() (resident, peak int64, err error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", a.cmd.Process.Pid))
	if err != nil {
		return 0, 0, err
	}
	return kilobytes(string(text), "VmRSS:"), kilobytes(string(text), "VmHWM:"), nil
}

// kilobytes reads a field of /proc/PID/status, in bytes; 0 without it.
func kilobytes(status, field string) int64 {
	for line := range strings.Lines(status) {
		if f := strings.Fields(line); len(f) == 3 && f[0] == field {
			n, _ := strconv.ParseInt(f[1], 10, 64)
			return n << 10
		}
	}
	return 0
}

// call executes the plugin for one pod and returns how long that took.
func (n *node) call(command string, pod int, netns string, conf []byte) (time.Duration, error) {
	cmd := exec.Command(n.plugin)
	cmd.Env = []string{
		"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "CNI_COMMAND=" + command, fmt.Sprintf("CNI_CONTAINERID=%064x", pod), "CNI_NETNS=" + netns,
		"CNI_IFNAME=eth0", "CNI_PATH=" + n.path("cni-bin"),
		fmt.Sprintf("CNI_ARGS=IgnoreUnknown=1;K8S_POD_NAMESPACE=bench;K8S_POD_NAME=%s;K8S_POD_INFRA_CONTAINER_ID=%064x;K8S_POD_UID=%s", podName(pod), pod, podUID(pod)),
	}
	var out bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = bytes.NewReader(conf), &out, &out
	begin := time.Now()
	err := cmd.Run()
	took := time.Since(begin)
	if err != nil {
		return took, fmt.Errorf("%s of pod %d: %w\n%s", command, pod, err, strings.TrimSpace(out.String()))
	}
	return took, nil
}

func podName(i int) string { return fmt.Sprintf("pod-%d", i) }
func podUID(i int) string  { return fmt.Sprintf("10000000-0000-4000-8000-%012x", i) }

// conf is what the container runtime gives the plugin on standard input, made
// from the list that the agent installed.
func (n *node) conf() ([]byte, error) {
	text, err := os.ReadFile(n.path("net.d/05-lash.conflist"))
	if err != nil {
		return nil, err
	}
	var list struct {
		CNIVersion string   `json:"cniVersion"`
		Name       string   `json:"name"`
		Plugins    []object `json:"plugins"`
	}
	if err := json.Unmarshal(text, &list); err != nil {
		return nil, fmt.Errorf("05-lash.conflist: %w", err)
	}
	if len(list.Plugins) == 0 {
		return nil, fmt.Errorf("05-lash.conflist names no plugin: %s", text)
	}
	p := list.Plugins[0]
	p["cniVersion"], p["name"] = list.CNIVersion, list.Name
	return json.Marshal(p)
}
