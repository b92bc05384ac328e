// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/cilium/ebpf"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	v2 "github.com/lash-net/lash/api/v2"
	"github.com/lash-net/lash/bpf"
	"github.com/lash-net/lash/internal/bench"
	"github.com/lash-net/lash/internal/model"
)

// Tokens of the users. Agents and operator are service accounts of kube-system, as in a real cluster: the API server
// gives each kind of user a share of its capacity.
const (
	adminToken = "admin"
	lashToken  = "lash"
	users      = `admin,admin,1,"system:masters"
lash,system:serviceaccount:kube-system:lash,2,"system:serviceaccounts,system:serviceaccounts:kube-system"
`
	apiPort    = 6443
	healthPort = 9879
	bpfRoot    = "/sys/fs/bpf"
)

// cluster is a control plane in a namespace of its own and three nodes.
type cluster struct {
	o        options
	dir      string
	topology *bench.Topology
	control  *bench.Node
	nodes    []*node
	running  []*process // in the order of their starts
	operator *process

	clientset kubernetes.Interface
	cilium    *v2.Clients
}

// node is a namespace in which a real agent runs.
type node struct {
	*bench.Node
	name       string
	dir        string
	cgroup     string
	pods4      netip.Prefix
	pods6      netip.Prefix
	taken      map[netip.Addr]bool // the router's and the health endpoint's
	agent      *process
	ipcache    *ebpf.Map
	next4      netip.Addr
	next6      netip.Addr
	kubeconfig string
}

// process is a program in a namespace.
type process struct {
	name  string
	cmd   *exec.Cmd
	ended chan struct{}
}

func (c *cluster) path(elem ...string) string {
	return filepath.Join(append([]string{c.dir}, elem...)...)
}

// spawn starts a program; it ends with this thread at the latest.
func (c *cluster) spawn(in *bench.Netns, name string, env []string, argv ...string) (*process, error) {
	log, err := os.OpenFile(c.path(name+".log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, err
	}
	defer log.Close()
	p := &process{name: name, cmd: exec.Command(argv[0], argv[1:]...), ended: make(chan struct{})}
	p.cmd.Env = append(os.Environ(), env...)
	p.cmd.Stdout, p.cmd.Stderr = log, log
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setpgid: true}
	if err := in.Do(p.cmd.Start); err != nil {
		return nil, fmt.Errorf("start %s: %w", name, err)
	}
	go func() { p.cmd.Wait(); close(p.ended) }()
	c.running = append(c.running, p)
	return p, nil
}

func (p *process) kill() {
	p.cmd.Process.Kill()
	<-p.ended
}

// memory is VmRSS, bytes.
func (p *process) memory() (int64, error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.cmd.Process.Pid))
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(text)) {
		if f := strings.Fields(line); len(f) == 3 && f[0] == "VmRSS:" {
			n, err := strconv.ParseInt(f[1], 10, 64)
			return n << 10, err
		}
	}
	return 0, errors.New("no VmRSS")
}

type usage struct {
	name string
	used time.Duration
}

// cpu is what each process has used that runs, this one's first and the others in the order of their starts.
func (c *cluster) cpu() []usage {
	var out []usage
	read := func(name, pid string) {
		text, err := os.ReadFile("/proc/" + pid + "/stat")
		if err != nil {
			return
		}
		_, rest, _ := strings.Cut(string(text), ") ")
		if f := strings.Fields(rest); len(f) > 12 {
			user, _ := strconv.Atoi(f[11])
			sys, _ := strconv.Atoi(f[12])
			out = append(out, usage{name, time.Duration(user+sys) * 10 * time.Millisecond})
		}
	}
	read("generator", "self")
	for _, p := range c.running {
		select {
		case <-p.ended:
			out = append(out, usage{name: p.name})
		default:
			read(p.name, strconv.Itoa(p.cmd.Process.Pid))
		}
	}
	return out
}

func (c *cluster) close() {
	for i := len(c.running) - 1; i >= 0; i-- {
		c.running[i].kill()
	}
	for _, n := range c.nodes {
		if n.ipcache != nil {
			n.ipcache.Close()
		}
		os.Remove(n.cgroup)
	}
	if c.topology != nil {
		c.topology.Close()
	}
}

func (c *cluster) keepLogs(dir string) {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		say("logs: %v", err)
		return
	}
	logs, _ := filepath.Glob(c.path("*.log"))
	for _, l := range logs {
		if b, err := os.ReadFile(l); err == nil {
			os.WriteFile(filepath.Join(dir, filepath.Base(l)), b, 0o644)
		}
	}
}

// start returns when three agents are ready.
func (c *cluster) start(ctx context.Context) (err error) {
	if c.topology, err = bench.NewTopology(); err != nil {
		return err
	}
	if c.control, err = c.topology.Node(); err != nil {
		return err
	}
	say("etcd and kube-apiserver")
	if err := c.startControlPlane(ctx); err != nil {
		return err
	}
	if err := c.startOperator(ctx); err != nil {
		return err
	}
	say("three agents")
	for i := range 3 {
		if err := c.addNode(ctx, i); err != nil {
			return err
		}
	}
	for _, n := range c.nodes {
		if err := c.startAgent(ctx, n); err != nil {
			return err
		}
	}
	for _, n := range c.nodes {
		if err := c.finishNode(ctx, n); err != nil {
			return err
		}
	}
	return c.nodesKnown(ctx)
}

func (c *cluster) binary(name string) (string, error) {
	found, _ := filepath.Glob(filepath.Join(c.o.cache, "*", name))
	if len(found) == 0 {
		return "", fmt.Errorf("no %s below %s: `bin/sandbox up` builds it once", name, c.o.cache)
	}
	return found[len(found)-1], nil
}

func (c *cluster) startControlPlane(ctx context.Context) error {
	etcd, err := c.binary("etcd")
	if err != nil {
		return err
	}
	apiserver, err := c.binary("kube-apiserver")
	if err != nil {
		return err
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	der, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		return err
	}
	if err := os.WriteFile(c.path("sa.key"), pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: der}), 0o600); err != nil {
		return err
	}
	if err := os.WriteFile(c.path("tokens"), []byte(users), 0o600); err != nil {
		return err
	}
	// They share two CPUs or so with three nodes and the generator. By Go's default the API server collects its garbage every
	// three seconds, with half of the CPUs each time; the more may pile up, the more memory it takes that is new to it, and
	// each page of that costs the machine some microseconds. A second thread of etcd would only look for work.
	frugal := []string{"GOGC=200"}
	if _, err := c.spawn(c.control.Netns, "etcd", append(frugal, "GOMAXPROCS=1"), etcd, "--data-dir="+c.path("etcd"), "--unsafe-no-fsync", "--log-level=warn",
		"--listen-client-urls=http://127.0.0.1:2379", "--advertise-client-urls=http://127.0.0.1:2379",
		"--listen-peer-urls=http://127.0.0.1:2380", "--initial-advertise-peer-urls=http://127.0.0.1:2380", "--initial-cluster=default=http://127.0.0.1:2380"); err != nil {
		return err
	}
	server, err := c.spawn(c.control.Netns, "kube-apiserver", frugal, apiserver, "--etcd-servers=http://127.0.0.1:2379", fmt.Sprintf("--secure-port=%d", apiPort),
		"--bind-address=0.0.0.0", "--advertise-address="+c.control.Addr4.String(), "--cert-dir="+c.path("certs"), "--token-auth-file="+c.path("tokens"),
		"--authorization-mode=AlwaysAllow", "--disable-admission-plugins=ServiceAccount", "--service-cluster-ip-range=10.96.0.0/16",
		"--service-account-issuer=https://bench", "--service-account-key-file="+c.path("sa.key"), "--service-account-signing-key-file="+c.path("sa.key"))
	if err != nil {
		return err
	}
	// Elsewhere it has a machine of its own: whoever waits for the CPU here, waits for it in the end. Threads that it starts
	// from now on inherit the priority.
	if err := syscall.Setpriority(syscall.PRIO_PROCESS, server.cmd.Process.Pid, -5); err != nil {
		return fmt.Errorf("priority of kube-apiserver: %w", err)
	}
	cfg := &rest.Config{
		Host: "https://" + c.apiAddr(), BearerToken: adminToken, TLSClientConfig: rest.TLSClientConfig{Insecure: true}, QPS: -1,
		Dial: func(ctx context.Context, network, addr string) (conn net.Conn, err error) {
			err = c.control.Do(func() (err error) {
				conn, err = (&net.Dialer{}).DialContext(ctx, network, addr)
				return err
			})
			return conn, err
		},
	}
	if c.cilium, err = v2.New(cfg); err != nil {
		return err
	}
	typed := rest.CopyConfig(cfg)
	typed.ContentType = "application/vnd.kubernetes.protobuf"
	if c.clientset, err = kubernetes.NewForConfig(typed); err != nil {
		return err
	}
	return poll(ctx, 60*time.Second, "the API server", func() (bool, error) {
		select {
		case <-server.ended:
			return false, errors.New("kube-apiserver ended\n" + c.tail("kube-apiserver"))
		default:
		}
		_, err := c.clientset.CoreV1().Namespaces().Get(ctx, "kube-system", metav1.GetOptions{})
		return err == nil, nil
	})
}

func (c *cluster) apiAddr() string { return netip.AddrPortFrom(c.control.Addr4, apiPort).String() }

func (c *cluster) tail(name string) string {
	text, _ := os.ReadFile(c.path(name + ".log"))
	lines := strings.Split(strings.TrimSpace(string(text)), "\n")
	return strings.Join(lines[max(0, len(lines)-15):], "\n")
}

func (c *cluster) writeKubeconfig(path string) error {
	return os.WriteFile(path, fmt.Appendf(nil, `apiVersion: v1
kind: Config
clusters: [{name: bench, cluster: {server: "https://%s", insecure-skip-tls-verify: true}}]
users: [{name: bench, user: {token: %s}}]
contexts: [{name: bench, context: {cluster: bench, user: bench}}]
current-context: bench
`, c.apiAddr(), lashToken), 0o600)
}

// startOperator starts the operator, or starts it anew with other flags, and waits until it leads.
func (c *cluster) startOperator(ctx context.Context, flags ...string) error {
	if err := c.writeKubeconfig(c.path("kubeconfig")); err != nil {
		return err
	}
	if c.operator != nil {
		c.operator.cmd.Process.Signal(syscall.SIGTERM)
		<-c.operator.ended
	}
	var err error
	argv := append([]string{c.o.operator, "--k8s-kubeconfig-path=" + c.path("kubeconfig"), "--ipam=kubernetes"}, flags...)
	if c.operator, err = c.spawn(c.control.Netns, "operator", []string{"POD_NAME=bench"}, argv...); err != nil {
		return err
	}
	return poll(ctx, 60*time.Second, "the definitions", func() (bool, error) {
		select {
		case <-c.operator.ended:
			return false, errors.New("the operator ended\n" + c.tail("operator"))
		default:
		}
		_, err := c.cilium.Endpoints.List(ctx, metav1.ListOptions{Limit: 1})
		return err == nil, nil
	})
}

// addNode makes a namespace and the Node object of it, with pod CIDRs for 4,000 pods.
func (c *cluster) addNode(ctx context.Context, i int) error {
	ns, err := c.topology.Node()
	if err != nil {
		return err
	}
	n := &node{Node: ns, name: fmt.Sprintf("node-%d", i), taken: map[netip.Addr]bool{}}
	n.pods4 = netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 80, byte(16 * i), 0}), 20)
	n.pods6 = netip.MustParsePrefix(fmt.Sprintf("fd00:80:%x::/116", i))
	n.dir = c.path(n.name)
	c.nodes = append(c.nodes, n)
	if err := n.AddDefaultRoutes(); err != nil {
		return err
	}
	for _, d := range []string{"state", "net.d", "cni-bin"} {
		if err := os.MkdirAll(filepath.Join(n.dir, d), 0o755); err != nil {
			return err
		}
	}
	if err := os.MkdirAll(filepath.Join(bpfRoot, n.name), 0o755); err != nil {
		return err
	}
	n.kubeconfig = filepath.Join(n.dir, "kubeconfig")
	if err := c.writeKubeconfig(n.kubeconfig); err != nil {
		return err
	}
	root, err := cgroup2()
	if err != nil {
		return err
	}
	n.cgroup = filepath.Join(root, fmt.Sprintf("lash-bench-%d-%s", os.Getpid(), n.name))
	if err := os.Mkdir(n.cgroup, 0o755); err != nil {
		return fmt.Errorf("child control group for the socket programs: %w", err)
	}
	obj := &corev1.Node{
		ObjectMeta: metav1.ObjectMeta{Name: n.name},
		Spec:       corev1.NodeSpec{PodCIDR: n.pods4.String(), PodCIDRs: []string{n.pods4.String(), n.pods6.String()}},
	}
	if obj, err = c.clientset.CoreV1().Nodes().Create(ctx, obj, metav1.CreateOptions{}); err != nil {
		return err
	}
	obj.Status.Addresses = []corev1.NodeAddress{{Type: corev1.NodeInternalIP, Address: n.Addr4.String()}, {Type: corev1.NodeInternalIP, Address: n.Addr6.String()}}
	_, err = c.clientset.CoreV1().Nodes().UpdateStatus(ctx, obj, metav1.UpdateOptions{})
	return err
}

// startAgent starts the agent of a node and waits until it is ready.
func (c *cluster) startAgent(ctx context.Context, n *node) (err error) {
	in := func(name string) string { return filepath.Join(n.dir, name) }
	n.agent, err = c.spawn(n.Netns, n.name, []string{"K8S_NODE_NAME=" + n.name}, c.o.agent,
		"--k8s-kubeconfig-path="+n.kubeconfig, "--ipam=kubernetes", "--enable-ipv6=true", "--bpf-root="+filepath.Join(bpfRoot, n.name), "--cgroup-root="+n.cgroup,
		"--ipv4-native-routing-cidr=10.80.0.0/16", "--ipv6-native-routing-cidr=fd00:80::/32", "--bpf-ct-max=1024",
		"--cni-conf-dir="+in("net.d"), "--cni-bin-dir="+in("cni-bin"), "--cni-socket-path="+in("cni.sock"),
		"--socket-path="+in("lash.sock"), "--state-dir="+in("state"), fmt.Sprintf("--agent-health-port=%d", healthPort))
	if err != nil {
		return err
	}
	health := http.Client{Timeout: time.Second, Transport: &http.Transport{DisableKeepAlives: true,
		DialContext: func(ctx context.Context, network, addr string) (conn net.Conn, err error) {
			err = n.Do(func() (err error) {
				conn, err = (&net.Dialer{}).DialContext(ctx, network, addr)
				return err
			})
			return conn, err
		}}}
	return poll(ctx, 60*time.Second, "the agent of "+n.name, func() (bool, error) {
		select {
		case <-n.agent.ended:
			return false, errors.New("the agent ended\n" + c.tail(n.name))
		default:
		}
		r, err := health.Get(fmt.Sprintf("http://127.0.0.1:%d/healthz", healthPort))
		if err != nil {
			return false, nil
		}
		defer r.Body.Close()
		return r.StatusCode == http.StatusOK, nil
	})
}

// finishNode opens the node's ipcache and learns which of its addresses are taken.
func (c *cluster) finishNode(ctx context.Context, n *node) (err error) {
	if n.ipcache, err = ebpf.LoadPinnedMap(filepath.Join(bpfRoot, n.name, "lash/maps/lash_ipcache"), nil); err != nil {
		return err
	}
	n.next4, n.next6 = n.pods4.Addr(), n.pods6.Addr()
	return poll(ctx, 20*time.Second, "the CiliumNode of "+n.name, func() (bool, error) {
		cn, err := c.cilium.Nodes.Get(ctx, n.name)
		if err != nil {
			return false, nil
		}
		for _, a := range cn.Spec.Addresses {
			if a.Type == v2.CiliumInternalIP {
				n.taken[netip.MustParseAddr(a.IP)] = true
			}
		}
		for _, s := range []string{cn.Spec.Health.IPv4, cn.Spec.Health.IPv6} {
			if a, err := netip.ParseAddr(s); err == nil {
				n.taken[a] = true
			}
		}
		return len(n.taken) == 4, nil
	})
}

// nodesKnown waits until every ipcache has the addresses of all nodes that are no pods'.
func (c *cluster) nodesKnown(ctx context.Context) error {
	return poll(ctx, 60*time.Second, "the nodes in every ipcache", func() (bool, error) {
		for _, n := range c.nodes {
			for _, other := range c.nodes {
				for a := range other.taken {
					var e bpf.IPCacheEntry
					err := n.ipcache.Lookup(bpf.IPCacheKeyFrom(netip.PrefixFrom(a, a.BitLen())), &e)
					if err != nil || model.Identity(e.Identity).World() {
						return false, nil
					}
				}
			}
		}
		return true, nil
	})
}

// profile writes to dir the use of CPU over eight seconds of the API server and of the first agent, and the API server's
// metrics after them.
func (c *cluster) profile(ctx context.Context, dir string) error {
	keep := func(name string, out []byte, err error) error {
		if err == nil {
			err = os.WriteFile(filepath.Join(dir, name), out, 0o644)
		}
		if err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		return nil
	}
	server := func(path string) ([]byte, error) {
		return c.clientset.CoreV1().RESTClient().Get().AbsPath(path).Param("seconds", "8").DoRaw(ctx)
	}
	agent := make(chan error, 1)
	go func() {
		out, err := c.nodes[0].get(ctx, "/debug/pprof/profile?seconds=8")
		agent <- keep("agent.pprof", out, err)
	}()
	out, err := server("/debug/pprof/profile")
	err = errors.Join(keep("kube-apiserver.pprof", out, err), <-agent)
	out, more := server("/metrics")
	return errors.Join(err, keep("kube-apiserver.metrics", out, more))
}

// refused is how many creations of CiliumIdentities the API server has refused: several nodes wanted the same one.
func (c *cluster) refused(ctx context.Context) (int, error) {
	text, err := c.clientset.CoreV1().RESTClient().Get().AbsPath("/metrics").DoRaw(ctx)
	if err != nil {
		return 0, err
	}
	n := 0
	for line := range strings.Lines(string(text)) {
		if strings.HasPrefix(line, `apiserver_request_total{code="409"`) && strings.Contains(line, `resource="ciliumidentities"`) && strings.Contains(line, `verb="POST"`) {
			count, err := strconv.Atoi(strings.TrimSpace(line[strings.LastIndexByte(line, ' '):]))
			if err != nil {
				return 0, err
			}
			n += count
		}
	}
	return n, nil
}

// get asks the node's agent.
func (n *node) get(ctx context.Context, path string) ([]byte, error) {
	client := http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", filepath.Join(n.dir, "lash.sock"))
	}}}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://agent"+path, nil)
	if err != nil {
		return nil, err
	}
	r, err := client.Do(req)
	if err != nil {
		return nil, err
	}
	defer r.Body.Close()
	return io.ReadAll(r.Body)
}

// take hands out the next pod's addresses.
func (n *node) take() (v4, v6 netip.Addr) {
	for n.next4 = n.next4.Next(); n.taken[n.next4]; n.next4 = n.next4.Next() {
	}
	for n.next6 = n.next6.Next(); n.taken[n.next6]; n.next6 = n.next6.Next() {
	}
	return n.next4, n.next6
}

// identity is what the node's kernel knows of an address: 0 if it is no pod that is known.
func (n *node) identity(a netip.Addr) uint32 {
	var e bpf.IPCacheEntry
	if n.ipcache.Lookup(bpf.IPCacheKeyFrom(netip.PrefixFrom(a, a.BitLen())), &e) != nil || e.Identity < 256 {
		return 0
	}
	return e.Identity
}

// rows is how many rows each ipcache has.
func (c *cluster) rows() ([]int, error) {
	var out []int
	for _, n := range c.nodes {
		var k bpf.IPCacheKey
		var v bpf.IPCacheEntry
		count := 0
		it := n.ipcache.Iterate()
		for it.Next(&k, &v) {
			count++
		}
		if err := it.Err(); err != nil {
			return nil, err
		}
		out = append(out, count)
	}
	return out, nil
}

// collect lets an impatient operator delete the identities and returns how many are left.
func (c *cluster) collect(ctx context.Context) (int, error) {
	if err := c.startOperator(ctx, "--identity-heartbeat-timeout=2s", "--identity-gc-interval=2s", "--cilium-endpoint-gc-interval=2s"); err != nil {
		return 0, err
	}
	left := 0
	err := poll(ctx, 180*time.Second, "the collection", func() (bool, error) {
		l, err := c.cilium.Identities.List(ctx, metav1.ListOptions{})
		if err != nil {
			return false, nil
		}
		left = len(l.Items)
		return left == 0, nil
	})
	if errors.Is(err, context.DeadlineExceeded) {
		err = nil
	}
	return left, err
}

// cgroup2 is where the unified hierarchy is mounted, on hybrid hosts too.
func cgroup2() (string, error) {
	text, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		return "", err
	}
	for line := range bytes.Lines(text) {
		if f := strings.Fields(string(line)); len(f) > 2 && f[2] == "cgroup2" {
			return f[1], nil
		}
	}
	return "", errors.New("no cgroup2 hierarchy is mounted here")
}

// poll waits for something that only asking tells.
func poll(ctx context.Context, limit time.Duration, what string, ok func() (bool, error)) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		if done, err := ok(); done || err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("waiting for %s: %w", what, ctx.Err())
		case <-tick.C:
		}
	}
}
