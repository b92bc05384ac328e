// SPDX-License-Identifier: Apache-2.0

package cluster

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/lash-net/lash/sandbox/image"
	"github.com/lash-net/lash/sandbox/node"
	"github.com/lash-net/lash/sandbox/plan"
	"github.com/lash-net/lash/sandbox/proc"
)

// maxPods of a node: more than a benchmark of a hundred pods needs, fewer than a /24 has addresses.
const maxPods = 200

func (c *Cluster) init(name string) proc.Ref { return c.process(name) }

// createNode makes a node's directory: certificates, configuration and containerd's images.
func (c *Cluster) createNode(name, golden string) error {
	i, err := plan.NodeIndex(name)
	if err != nil {
		return err
	}
	v4, v6 := plan.NodeAddrs(i)
	s := node.Spec{
		Name: name, Dir: c.nodeDir(name), IP4: v4, IP6: v6, Gateway4: plan.Gateway4, Gateway6: plan.Gateway6,
		Zone: plan.Zone(i), Proxy: c.Proxy, Pods: []netip.Prefix{plan.Pods4, plan.Pods6}, DNS: plan.DNS4,
		APIServer: apiServerURL(), APIHost: plan.ControlPlane4, Sandbox: image.Pause,
		Kubelet: c.cache.Bin("kubelet"), KubeProxy: c.cache.Bin("kube-proxy"), MaxPods: maxPods,
	}
	if err := s.Write(); err != nil {
		return err
	}
	d := c.pki()
	user, serving := "node-"+name, "node-"+name+"-serving"
	if err := errors.Join(
		d.Leaf(user, "ca", "system:node:"+name, []string{"system:nodes"}, nil),
		d.Leaf(serving, "ca", "system:node:"+name, []string{"system:nodes"}, []string{name}, v4, v6),
	); err != nil {
		return err
	}
	if err := c.kubeconfig(user, user+".conf", apiServerURL()); err != nil {
		return err
	}
	for from, to := range map[string]string{
		"ca.crt": "ca.crt", serving + ".crt": "serving.crt", serving + ".key": "serving.key",
		user + ".conf": "kubelet.conf", "kube-proxy.conf": "kube-proxy.conf",
	} {
		if err := copyFile(d.Path(from), filepath.Join(s.Dir, "etc/kubernetes", to), 0o600); err != nil {
			return err
		}
	}
	// containerd itself runs the loopback plugin for every pod, whatever the CNI
	if err := copyFile("/usr/lib/cni/loopback", filepath.Join(s.Dir, "opt/cni/bin/loopback"), 0o755); err != nil {
		return err
	}
	return cloneRoot(golden, filepath.Join(s.Dir, "var/lib/containerd"))
}

// bootNode gives a stopped node its network and process 1.
func (c *Cluster) bootNode(ctx context.Context, name string) error {
	i, err := plan.NodeIndex(name)
	if err != nil {
		return err
	}
	if err := deleteNetns(c.netns(name)); err != nil {
		return err
	}
	// the bridge's end of a link disappears with the namespace of its other end, a moment later
	_ = ip(ctx, c.netns(plan.Switch), "link delete "+name)
	v4, v6 := plan.NodeAddrs(i)
	if err := c.attach(ctx, name, v4, v6); err != nil {
		return err
	}
	if err := os.Remove(filepath.Join(c.nodeDir(name), "etc/kubernetes/boot_id")); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	l := node.Launch{Cgroup: c.cgroup(name), Netns: c.netnsPath(name), Pidfile: c.pidfile(name), NodeDir: c.nodeDir(name)}
	if err := l.Start(c.layout, c.logfile(name)); err != nil {
		return fmt.Errorf("boot node %s: %w", name, err)
	}
	if !c.init(name).Alive() {
		return fmt.Errorf("node %s ended at once: %s", name, c.logTail(name))
	}
	return nil
}

func (c *Cluster) logTail(name string) string {
	b, err := os.ReadFile(c.logfile(name))
	if err != nil {
		return "no log: " + err.Error()
	}
	return c.logfile(name) + ":\n" + lastLines(string(b), 8)
}

// KillNode is a power failure: everything in the node ends at once, and its network is gone.
func (c *Cluster) KillNode(ctx context.Context, name string) error {
	if err := c.HasNode(name); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	c.init(name).Kill()
	if err := c.layout.Kill(ctx, c.cgroup(name)); err != nil {
		return err
	}
	if err := c.layout.Remove(ctx, c.cgroup(name)); err != nil {
		return err
	}
	_ = ip(ctx, c.netns(plan.Switch), "link delete "+name) // the link leaves the bridge now, not when the kernel finds time
	return deleteNetns(c.netns(name))
}

// RestartNodes boots nodes again, all at once; running ones are killed first.
func (c *Cluster) RestartNodes(ctx context.Context, names ...string) error {
	for _, n := range names {
		if err := c.HasNode(n); err != nil {
			return err
		}
	}
	if err := each(names, func(n string) error { return c.KillNode(ctx, n) }); err != nil {
		return err
	}
	if err := each(names, func(n string) error { return c.bootNode(ctx, n) }); err != nil {
		return err
	}
	return c.syncCNI(ctx)
}

// WaitBooted returns when Kubernetes has noticed the nodes' latest boot: the boot number that kubelet
// reports is the one that the node gave itself.
func (c *Cluster) WaitBooted(ctx context.Context, limit time.Duration, names ...string) error {
	return poll(ctx, limit, "nodes back in Kubernetes", func() (bool, error) {
		out, err := c.Kubectl(ctx, "get", "nodes", "-o", `jsonpath={range .items[*]}{.metadata.name}={.status.nodeInfo.bootID}{"\n"}{end}`)
		if err != nil {
			return false, err
		}
		for _, n := range names {
			id, err := os.ReadFile(filepath.Join(c.nodeDir(n), "etc/kubernetes/boot_id"))
			if err != nil || !strings.Contains("\n"+out, "\n"+n+"="+strings.TrimSpace(string(id))+"\n") {
				return false, fmt.Errorf("kubelet of %s has not reported; see %s", n, filepath.Join(c.nodeDir(n), "var/log/kubelet.log"))
			}
		}
		return true, nil
	})
}

// AddNode adds the node with the lowest free number and returns its name.
func (c *Cluster) AddNode(ctx context.Context) (string, error) {
	golden, err := c.Prepare(ctx) // this program may be newer than the one that started the sandbox
	if err != nil {
		return "", err
	}
	for i := 1; i <= plan.MaxNodes; i++ {
		name := plan.NodeName(i)
		if slices.Contains(c.Nodes, name) {
			continue
		}
		c.Nodes = append(c.Nodes, name)
		if err := c.save(); err != nil {
			return name, err
		}
		if err := errors.Join(os.RemoveAll(c.nodeDir(name)), c.createNode(name, golden)); err != nil {
			return name, err
		}
		if err := c.bootNode(ctx, name); err != nil {
			return name, err
		}
		if err := c.loadInto(ctx, name, c.loaded()...); err != nil {
			return name, err
		}
		if err := c.waitRegistered(ctx, name); err != nil {
			return name, err
		}
		return name, c.syncCNI(ctx)
	}
	return "", fmt.Errorf("a sandbox has at most %d nodes", plan.MaxNodes)
}

// RemoveNode takes a node away for good: machine, Node object, and the pods that ran there.
func (c *Cluster) RemoveNode(ctx context.Context, name string) error {
	if err := c.KillNode(ctx, name); err != nil {
		return err
	}
	var errs []error
	if _, err := c.Kubectl(ctx, "delete", "node", name, "--ignore-not-found"); err != nil {
		errs = append(errs, err)
	}
	if _, err := c.Kubectl(ctx, "delete", "pods", "-A", "--field-selector=spec.nodeName="+name, "--force", "--grace-period=0"); err != nil {
		errs = append(errs, err)
	}
	c.Nodes = slices.DeleteFunc(c.Nodes, func(n string) bool { return n == name })
	errs = append(errs, c.save(), os.RemoveAll(c.nodeDir(name)), os.Remove(c.pidfile(name)), c.syncCNI(ctx))
	return errors.Join(errs...)
}

func (c *Cluster) waitRegistered(ctx context.Context, names ...string) error {
	return poll(ctx, 120*time.Second, "registration of nodes", func() (bool, error) {
		out, err := c.Kubectl(ctx, "get", "nodes", "-o", `jsonpath={range .items[*]}{.metadata.name}={.spec.podCIDRs[1]}{"\n"}{end}`)
		if err != nil {
			return false, err
		}
		for _, n := range names {
			if !strings.Contains("\n"+out, "\n"+n+"=fd") {
				if !c.init(n).Alive() {
					return true, fmt.Errorf("node %s has ended: %s", n, c.logTail(n))
				}
				return false, fmt.Errorf("node %s has not registered; see %s", n, filepath.Join(c.nodeDir(n), "var/log/kubelet.log"))
			}
		}
		return true, nil
	})
}

// Target is where a command for a node, or for one of the hosts cp, outside, sw, runs.
func (c *Cluster) Target(host string) (node.Target, error) {
	switch host {
	case plan.ControlPlane, plan.Outside, plan.Switch:
		return node.Target{Cgroup: c.cgroup(plan.ControlPlane), Netns: c.netnsPath(host)}, nil
	}
	if err := c.HasNode(host); err != nil {
		return node.Target{}, fmt.Errorf("%w (and the hosts cp, outside, sw)", err)
	}
	ref := c.init(host)
	if !ref.Alive() {
		return node.Target{}, fmt.Errorf("node %s is stopped: boot it with `sandbox restart%s %s`", host, c.nameFlag(), host)
	}
	cg := c.cgroup(host)
	if c.layout.Unified {
		cg += "/system"
	}
	return node.Target{Cgroup: cg, Init: ref}, nil
}

// Exec runs a command on a node or host and returns its output; `sandbox exec` does it by executing itself.
func (c *Cluster) Exec(ctx context.Context, host string, argv ...string) (string, error) {
	cmd, err := c.ExecCommand(ctx, host, argv...)
	if err != nil {
		return "", err
	}
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return stdout.String(), fmt.Errorf("%s on %s: %w: %s", argv[0], host, err, strings.TrimSpace(stderr.String()))
	}
	return stdout.String(), nil
}

// ExecCommand is the command that Exec runs. When ctx ends it is told to end, and passes that on.
func (c *Cluster) ExecCommand(ctx context.Context, host string, argv ...string) (*exec.Cmd, error) {
	return c.execCommand(ctx, host, nil, argv)
}

// execCommand is `sandbox exec` with these flags.
func (c *Cluster) execCommand(ctx context.Context, host string, flags, argv []string) (*exec.Cmd, error) {
	if _, err := c.Target(host); err != nil {
		return nil, err
	}
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	cmd := exec.CommandContext(ctx, self, slices.Concat([]string{"exec", "--name", c.Name}, flags, []string{host, "--"}, argv)...)
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = 5 * time.Second
	return cmd, nil
}

// Toolbox is the path of the sandbox's test program on this machine.
func (c *Cluster) Toolbox() string { return c.cache.Bin("toolbox") }

// loaded lists the archives that `sandbox load` was given; nodes that join later get them too.
func (c *Cluster) loaded() []string {
	list, _ := filepath.Glob(c.path("images", "*.tar"))
	slices.Sort(list)
	return list
}

// Load imports an image archive (docker-archive or OCI) into the containerd of every running node.
func (c *Cluster) Load(ctx context.Context, archive string) error {
	if st, err := os.Stat(archive); err != nil {
		return err
	} else if !st.Mode().IsRegular() {
		return fmt.Errorf("%s is not an image archive (a tar file)", archive)
	}
	if err := os.MkdirAll(c.path("images"), 0o755); err != nil {
		return err
	}
	keep := c.path("images", filepath.Base(strings.TrimSuffix(archive, ".tar"))+".tar")
	if err := copyFile(archive, keep, 0o644); err != nil {
		return err
	}
	return each(c.Nodes, func(n string) error {
		if !c.init(n).Alive() {
			return nil
		}
		return c.loadInto(ctx, n, keep)
	})
}

func (c *Cluster) loadInto(ctx context.Context, name string, archives ...string) error {
	if len(archives) == 0 {
		return nil
	}
	if err := poll(ctx, 30*time.Second, "containerd on "+name, func() (bool, error) {
		_, err := c.Exec(ctx, name, "ctr", "version")
		return err == nil, err
	}); err != nil {
		return err
	}
	for _, a := range archives {
		f, err := os.Open(a)
		if err != nil {
			return err
		}
		cmd, err := c.ExecCommand(ctx, name, "ctr", "-n", "k8s.io", "images", "import", "-")
		if err != nil {
			f.Close()
			return err
		}
		cmd.Stdin = f
		out, err := cmd.CombinedOutput()
		f.Close()
		if err != nil {
			return fmt.Errorf("import %s on %s: %w: %s", a, name, err, lastLines(string(out), 5))
		}
	}
	return nil
}

// each runs f for all names at once and joins the errors.
func each(names []string, f func(string) error) error {
	errs := make([]error, len(names))
	var wg sync.WaitGroup
	for i, n := range names {
		wg.Add(1)
		go func() {
			defer wg.Done()
			errs[i] = f(n)
		}()
	}
	wg.Wait()
	return errors.Join(errs...)
}
