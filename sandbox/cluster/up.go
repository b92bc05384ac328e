// SPDX-License-Identifier: Apache-2.0

package cluster

import (
	"context"
	_ "embed"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/lash-net/lash/sandbox/build"
	"github.com/lash-net/lash/sandbox/deps"
	"github.com/lash-net/lash/sandbox/image"
	"github.com/lash-net/lash/sandbox/plan"
)

//go:embed coredns.yaml
var coreDNS string

// ErrAlreadyUp is returned by Up for a sandbox that runs.
var ErrAlreadyUp = errors.New("already up")

// Options of Up.
type Options struct {
	Nodes int
	Proxy string
	CNI   string
	DNS   int // replicas of CoreDNS; 0 for none
}

// Check says which option is wrong and what it may be.
func (o Options) Check() error {
	switch {
	case o.Nodes < 1 || o.Nodes > plan.MaxNodes:
		return fmt.Errorf("--nodes %d: use 1 to %d", o.Nodes, plan.MaxNodes)
	case !slices.Contains(Proxies, o.Proxy):
		return fmt.Errorf("--proxy %q: use one of %s", o.Proxy, strings.Join(Proxies, ", "))
	case !slices.Contains(CNIs, o.CNI):
		return fmt.Errorf("--cni %q: use one of %s", o.CNI, strings.Join(CNIs, ", "))
	case o.DNS < 0 || o.DNS > 10:
		return fmt.Errorf("--dns %d: use 0 to 10 replicas", o.DNS)
	}
	return nil
}

// Prepare makes everything that all sandboxes share: packages, programs, images. It is slow once.
func (c *Cluster) Prepare(ctx context.Context) (golden string, err error) {
	if err := deps.Cluster.Ensure(ctx, c.Say); err != nil {
		return "", err
	}
	if err := c.cache.Ensure(ctx, build.Cluster, c.Say); err != nil {
		return "", err
	}
	return c.golden(ctx)
}

// Up starts the sandbox. On an error what was started stays, for a look at its logs; Down removes it.
func (c *Cluster) Up(ctx context.Context, o Options) error {
	if err := o.Check(); err != nil {
		return err
	}
	if err := c.claim(ctx); err != nil {
		return err
	}
	defer c.Unlock()
	golden, err := c.Prepare(ctx)
	if err != nil {
		_, _ = os.Remove(c.Dir), os.Remove(StateDir) // as empty as claim made them
		return err
	}
	for _, d := range []string{"pid", "log", "nodes", "images"} {
		if err := os.MkdirAll(c.path(d), 0o755); err != nil {
			return err
		}
	}
	c.Config = Config{Name: c.Name, Proxy: o.Proxy, CNI: o.CNI, DNS: o.DNS}
	for i := 1; i <= o.Nodes; i++ {
		c.Nodes = append(c.Nodes, plan.NodeName(i))
	}
	if c.Port, err = freePort(); err != nil {
		return err
	}
	if err := errors.Join(c.save(), c.certificates()); err != nil {
		return err
	}
	if err := c.underlay(ctx); err != nil {
		return err
	}
	for _, p := range []string{"etcd", "apiserver", "forwarder", "outside"} {
		if err := c.StartComponent(p); err != nil {
			return err
		}
	}
	c.Say("network, etcd and API server started")
	if err := each(c.Nodes, func(n string) error { return c.createNode(n, golden) }); err != nil {
		return err
	}
	for _, n := range c.Nodes { // ip(8) needs them one after another only for a moment each
		if err := c.bootNode(ctx, n); err != nil {
			return err
		}
	}
	c.Say("%d nodes booted", len(c.Nodes))
	if err := c.WaitAPIServer(ctx); err != nil {
		return fmt.Errorf("%w; %s", err, c.logTail("apiserver"))
	}
	c.Say("API server ready")
	for _, p := range []string{"controller-manager", "scheduler"} {
		if err := c.StartComponent(p); err != nil {
			return err
		}
	}
	if o.DNS > 0 {
		manifest := strings.NewReplacer("$REPLICAS", strconv.Itoa(o.DNS), "$IMAGE", image.CoreDNS, "$DNS4", plan.DNS4.String(), "$DNS6", plan.DNS6.String()).Replace(coreDNS)
		if err := poll(ctx, 30*time.Second, "CoreDNS", func() (bool, error) {
			_, err := c.KubectlInput(ctx, manifest, "apply", "-f", "-")
			return err == nil, err
		}); err != nil {
			return err
		}
	}
	if err := c.waitRegistered(ctx, c.Nodes...); err != nil {
		return err
	}
	if !c.process("forwarder").Alive() {
		return fmt.Errorf("the forwarder has ended; %s", c.logTail("forwarder"))
	}
	if c.CNI == "none" {
		c.Say("%d nodes registered; they become Ready once a CNI is installed", len(c.Nodes))
		c.Whole = true
		return c.save()
	}
	if err := c.syncCNI(ctx); err != nil {
		return err
	}
	if err := c.WaitNodesReady(ctx, 60*time.Second); err != nil {
		return err
	}
	c.Say("%d nodes Ready", len(c.Nodes))
	c.Whole = true
	return c.save()
}

// claim makes the sandbox's directory and locks it, from the first moment on: a second Up of the same name ends here.
// What an earlier sandbox has left is removed.
func (c *Cluster) claim(ctx context.Context) error {
	for {
		if err := os.MkdirAll(c.Dir, 0o755); err != nil {
			return err
		}
		if err := c.TryLock(); errors.Is(err, os.ErrNotExist) {
			continue // a Down has just removed it
		} else if err != nil {
			return err
		}
		left := c.Exists()
		if entries, err := os.ReadDir(c.Dir); err == nil && len(entries) == 0 && len(left) == 1 {
			return nil
		}
		if err := c.load(); err == nil && c.Whole && c.process("apiserver").Alive() {
			c.Unlock()
			return fmt.Errorf("sandbox %q is %w with nodes %s: look with `sandbox status%s`, end it with `sandbox down%s`", c.Name, ErrAlreadyUp, strings.Join(c.Nodes, ", "), c.nameFlag(), c.nameFlag())
		}
		c.Say("cleaning leftovers of an earlier sandbox %q: %s", c.Name, strings.Join(left, "; "))
		err := c.Down(ctx)
		c.Unlock() // of the directory that is gone
		if err != nil {
			return err
		}
	}
}

// Down removes everything of the sandbox from any state, and returns an error if anything is left.
func (c *Cluster) Down(ctx context.Context) error {
	if _, err := os.Stat(c.Dir); err == nil && c.lock == nil {
		if err := c.Lock(ctx); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
		defer c.Unlock()
	}
	ctx, cancel := context.WithTimeout(ctx, 60*time.Second)
	defer cancel()
	top := cgroupRoot + "/" + c.Name
	if err := c.layout.Kill(ctx, top); err != nil {
		return err
	}
	namespaces := listNetns(c.Name)
	users := netnsUsers(namespaces)
	for _, ns := range namespaces {
		if err := deleteNetns(ns); err != nil {
			return err
		}
	}
	if err := c.layout.Remove(ctx, top); err != nil {
		return err
	}
	c.layout.RemoveIfEmpty(cgroupRoot)
	if err := detachMounts(c.Dir); err != nil {
		return err
	}
	if err := os.RemoveAll(c.Dir); err != nil {
		return err
	}
	_ = os.Remove(StateDir) // if it was the last sandbox
	c.Nodes = nil
	for _, u := range users {
		c.Say("warning: %s still runs in a namespace of this sandbox and keeps it alive; it is not the sandbox's own, end it yourself", u)
	}
	if left := c.Exists(); len(left) > 0 {
		return fmt.Errorf("left behind: %s", strings.Join(left, "; "))
	}
	return nil
}

// netnsUsers lists processes in the namespaces that are not in the sandbox's cgroup (all of those are dead).
func netnsUsers(namespaces []string) []string {
	inodes := map[uint64]string{}
	for _, ns := range namespaces {
		var st syscall.Stat_t
		if syscall.Stat(netnsDir+"/"+ns, &st) == nil {
			inodes[st.Ino] = ns
		}
	}
	entries, err := os.ReadDir("/proc")
	if err != nil || len(inodes) == 0 {
		return nil
	}
	var users []string
	for _, e := range entries {
		if _, err := strconv.Atoi(e.Name()); err != nil {
			continue
		}
		var st syscall.Stat_t
		if syscall.Stat("/proc/"+e.Name()+"/ns/net", &st) != nil {
			continue
		}
		if ns, ok := inodes[st.Ino]; ok {
			comm, _ := os.ReadFile("/proc/" + e.Name() + "/comm")
			users = append(users, fmt.Sprintf("process %s (%s, namespace %s)", e.Name(), strings.TrimSpace(string(comm)), ns))
		}
	}
	return users
}

// detachMounts unmounts what lies below dir in this mount namespace, last mount first.
func detachMounts(dir string) error {
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return err
	}
	var points []string
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); len(f) > 4 && strings.HasPrefix(f[4], dir+"/") {
			points = append(points, f[4])
		}
	}
	slices.Reverse(points)
	for _, p := range points {
		if err := unix.Unmount(p, unix.MNT_DETACH); err != nil {
			return fmt.Errorf("unmount %s: %w", p, err)
		}
	}
	return nil
}
