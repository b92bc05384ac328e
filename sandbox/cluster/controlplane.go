// SPDX-License-Identifier: Apache-2.0

package cluster

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/lash-net/lash/sandbox/node"
	"github.com/lash-net/lash/sandbox/plan"
)

// Components are the processes of the control plane, in the order in which they start. The forwarder
// carries 127.0.0.1:PORT of the machine to the API server; it is what `sandbox kubeconfig` names. The test
// server on the outside machine (HTTP 8080, UDP 8081, TCP 8082) says from which address it was asked.
var Components = []string{"etcd", "apiserver", "controller-manager", "scheduler", "forwarder", "outside"}

// ForwardCommand is the hidden subcommand that is the forwarder.
const ForwardCommand = "__forward"

// apiServerURL is the API server as seen from inside the sandbox.
func apiServerURL() string {
	return "https://" + netip.AddrPortFrom(plan.ControlPlane4, plan.APIPort).String()
}

func (c *Cluster) certificates() error {
	d := c.pki()
	svc := "kubernetes.default.svc.cluster.local"
	names := []string{"localhost", "kubernetes", "kubernetes.default", "kubernetes.default.svc", svc}
	if err := errors.Join(d.CA("ca"), d.CA("front-proxy-ca"), d.KeyPair("sa")); err != nil {
		return err
	}
	loopback := []netip.Addr{netip.MustParseAddr("127.0.0.1"), netip.IPv6Unspecified().Next()}
	if err := errors.Join(
		d.Leaf("apiserver", "ca", "kube-apiserver", nil, names, append(loopback, plan.APIService4, plan.Services6.Addr().Next(), plan.ControlPlane4, plan.ControlPlane6)...),
		d.Leaf("apiserver-kubelet-client", "ca", "kube-apiserver-kubelet-client", []string{"system:masters"}, nil),
		d.Leaf("front-proxy-client", "front-proxy-ca", "front-proxy-client", nil, nil),
		d.Leaf("admin", "ca", "admin", []string{"system:masters"}, nil),
		d.Leaf("controller-manager", "ca", "system:kube-controller-manager", nil, nil),
		d.Leaf("scheduler", "ca", "system:kube-scheduler", nil, nil),
		d.Leaf("kube-proxy", "ca", "system:kube-proxy", nil, nil),
	); err != nil {
		return err
	}
	for _, who := range []string{"admin", "controller-manager", "scheduler", "kube-proxy"} {
		if err := c.kubeconfig(who, who+".conf", apiServerURL()); err != nil {
			return err
		}
	}
	return c.kubeconfig("admin", "kubeconfig", "https://127.0.0.1:"+strconv.Itoa(c.Port))
}

func (c *Cluster) kubeconfig(who, file, server string) error {
	b, err := c.pki().Kubeconfig("sandbox-"+c.Name, who, server)
	if err != nil {
		return err
	}
	return os.WriteFile(c.pki().Path(file), b, 0o600)
}

// Kubeconfig is the administrator's kubeconfig: for programs on this machine, or (internal) for
// programs inside the sandbox's namespaces.
func (c *Cluster) Kubeconfig(internal bool) string {
	if internal {
		return c.pki().Path("admin.conf")
	}
	return c.pki().Path("kubeconfig")
}

// freePort finds a port for the forwarder that nobody listens on and no other sandbox was given.
func freePort() (int, error) {
	taken := map[int]bool{}
	for _, n := range Names() {
		var other Config
		if b, err := os.ReadFile(filepath.Join(StateDir, n, "config.json")); err == nil && json.Unmarshal(b, &other) == nil {
			taken[other.Port] = true
		}
	}
	for p := 16443; p < 16543; p++ {
		if taken[p] {
			continue
		}
		if l, err := net.Listen("tcp", "127.0.0.1:"+strconv.Itoa(p)); err == nil {
			l.Close()
			return p, nil
		}
	}
	return 0, errors.New("no free port on 127.0.0.1 between 16443 and 16542 for the API server")
}

func (c *Cluster) command(component string) []string {
	k := func(f string) string { return c.pki().Path(f) }
	both := func(a, b netip.Prefix) string { return a.String() + "," + b.String() }
	switch component {
	case "etcd":
		return []string{c.cache.Bin("etcd"), "--data-dir=" + c.path("etcd"), "--unsafe-no-fsync", "--log-level=warn",
			"--listen-client-urls=http://127.0.0.1:2379", "--advertise-client-urls=http://127.0.0.1:2379",
			"--listen-peer-urls=http://127.0.0.1:2380", "--initial-advertise-peer-urls=http://127.0.0.1:2380",
			"--initial-cluster=default=http://127.0.0.1:2380"}
	case "apiserver":
		return []string{c.cache.Bin("kube-apiserver"), "--etcd-servers=http://127.0.0.1:2379",
			"--bind-address=::", "--advertise-address=" + plan.ControlPlane4.String(), "--secure-port=" + strconv.Itoa(plan.APIPort),
			"--service-cluster-ip-range=" + both(plan.Services4, plan.Services6),
			"--authorization-mode=Node,RBAC", "--enable-admission-plugins=NodeRestriction", "--allow-privileged=true",
			"--client-ca-file=" + k("ca.crt"), "--tls-cert-file=" + k("apiserver.crt"), "--tls-private-key-file=" + k("apiserver.key"),
			"--kubelet-certificate-authority=" + k("ca.crt"), "--kubelet-client-certificate=" + k("apiserver-kubelet-client.crt"),
			"--kubelet-client-key=" + k("apiserver-kubelet-client.key"), "--kubelet-preferred-address-types=InternalIP,Hostname",
			"--requestheader-client-ca-file=" + k("front-proxy-ca.crt"), "--requestheader-allowed-names=front-proxy-client",
			"--requestheader-extra-headers-prefix=X-Remote-Extra-", "--requestheader-group-headers=X-Remote-Group", "--requestheader-username-headers=X-Remote-User",
			"--proxy-client-cert-file=" + k("front-proxy-client.crt"), "--proxy-client-key-file=" + k("front-proxy-client.key"),
			"--service-account-issuer=https://kubernetes.default.svc.cluster.local",
			"--service-account-key-file=" + k("sa.pub"), "--service-account-signing-key-file=" + k("sa.key")}
	case "controller-manager":
		return []string{c.cache.Bin("kube-controller-manager"), "--kubeconfig=" + k("controller-manager.conf"),
			"--authentication-kubeconfig=" + k("controller-manager.conf"), "--authorization-kubeconfig=" + k("controller-manager.conf"),
			"--leader-elect=false", "--bind-address=127.0.0.1", "--use-service-account-credentials=true",
			"--allocate-node-cidrs=true", "--cluster-cidr=" + both(plan.Pods4, plan.Pods6),
			"--node-cidr-mask-size-ipv4=" + strconv.Itoa(plan.PodMask4), "--node-cidr-mask-size-ipv6=" + strconv.Itoa(plan.PodMask6),
			"--service-cluster-ip-range=" + both(plan.Services4, plan.Services6),
			"--service-account-private-key-file=" + k("sa.key"), "--root-ca-file=" + k("ca.crt"),
			"--cluster-signing-cert-file=" + k("ca.crt"), "--cluster-signing-key-file=" + k("ca.key")}
	case "scheduler":
		return []string{c.cache.Bin("kube-scheduler"), "--kubeconfig=" + k("scheduler.conf"),
			"--authentication-kubeconfig=" + k("scheduler.conf"), "--authorization-kubeconfig=" + k("scheduler.conf"),
			"--leader-elect=false", "--bind-address=127.0.0.1"}
	case "outside":
		return []string{c.cache.Bin("toolbox"), "serve"}
	case "forwarder":
		self, err := os.Executable()
		if err != nil {
			self = os.Args[0]
		}
		return []string{self, ForwardCommand, "127.0.0.1:" + strconv.Itoa(c.Port), c.netnsPath(plan.ControlPlane),
			netip.AddrPortFrom(plan.ControlPlane4, plan.APIPort).String()}
	}
	panic("unknown component " + component)
}

// CheckComponent refuses names that are no component's.
func CheckComponent(name string) error {
	if slices.Contains(Components, name) {
		return nil
	}
	return fmt.Errorf("%q is not a part of the control plane; choose from %s", name, strings.Join(Components, ", "))
}

// StartComponent starts a component unless it runs.
func (c *Cluster) StartComponent(name string) error {
	if c.process(name).Alive() {
		return nil
	}
	l := node.Launch{Cgroup: c.cgroup(plan.ControlPlane), Netns: c.netnsPath(plan.ControlPlane), Pidfile: c.pidfile(name), Argv: c.command(name)}
	switch name {
	case "forwarder":
		l.Netns = ""
	case "outside":
		l.Netns = c.netnsPath(plan.Outside)
	}
	if err := l.Start(c.layout, c.logfile(name)); err != nil {
		return fmt.Errorf("start %s: %w", name, err)
	}
	return nil
}

// StopComponent ends a component with SIGKILL, as a crash would, and returns when it is gone.
func (c *Cluster) StopComponent(ctx context.Context, name string) error {
	ref := c.process(name)
	ref.Kill()
	return poll(ctx, 10*time.Second, "end of "+name, func() (bool, error) { return !ref.Alive(), nil })
}

// WaitAPIServer returns when the API server is ready, or as soon as it or etcd has died.
func (c *Cluster) WaitAPIServer(ctx context.Context) error {
	return poll(ctx, 120*time.Second, "the API server", func() (bool, error) {
		if _, err := c.Kubectl(ctx, "get", "--raw", "/readyz"); err == nil {
			return true, nil
		}
		for _, p := range []string{"etcd", "apiserver"} {
			if !c.process(p).Alive() {
				return true, fmt.Errorf("%s has ended", p)
			}
		}
		return false, nil
	})
}

// Kubectl runs kubectl as administrator, from the control plane's namespace, and returns its output.
func (c *Cluster) Kubectl(ctx context.Context, args ...string) (string, error) {
	return c.KubectlInput(ctx, "", args...)
}

// KubectlInput is Kubectl with text on its standard input.
func (c *Cluster) KubectlInput(ctx context.Context, stdin string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, "nsenter", append([]string{"--net=" + c.netnsPath(plan.ControlPlane), c.cache.Bin("kubectl")}, args...)...)
	cmd.Env = append(os.Environ(), "KUBECONFIG="+c.Kubeconfig(true))
	cmd.Stdin = strings.NewReader(stdin)
	var stdout, stderr strings.Builder
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return stdout.String(), fmt.Errorf("kubectl %s: %w: %s", strings.Join(args, " "), err, strings.TrimSpace(stderr.String()))
	}
	return stdout.String(), nil
}

// KubectlCommand is what `sandbox kubectl` executes: a command line and its environment.
func (c *Cluster) KubectlCommand(args []string) (argv, env []string) {
	return append([]string{c.cache.Bin("kubectl")}, args...), append(os.Environ(), "KUBECONFIG="+c.Kubeconfig(true))
}
