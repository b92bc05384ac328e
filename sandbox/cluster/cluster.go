// SPDX-License-Identifier: Apache-2.0

// Package cluster brings a sandbox up and down: its underlay, its control plane and its nodes.
//
// What a sandbox owns on the machine, and nothing else: network namespaces sb-NAME-*, cgroup
// lash-sandbox/NAME with every process in it, and the directory StateDir/NAME. Each of these can be
// found without the others, so Down works from any state.
package cluster

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/lash-net/lash/sandbox/build"
	"github.com/lash-net/lash/sandbox/cgroup"
	"github.com/lash-net/lash/sandbox/pki"
	"github.com/lash-net/lash/sandbox/plan"
	"github.com/lash-net/lash/sandbox/proc"
)

// Directories on the machine.
const (
	StateDir   = "/var/lib/lash-sandbox"
	CacheDir   = "/var/cache/lash-sandbox"
	cgroupRoot = "lash-sandbox"
)

// Values of Config.Proxy and Config.CNI.
var (
	Proxies = []string{"none", "iptables"}
	CNIs    = []string{"none", "bridge"}
)

// Config is what a sandbox was asked to be; it is stored as config.json.
type Config struct {
	Name  string   `json:"name"`
	Proxy string   `json:"proxy"` // service proxy: none, iptables
	CNI   string   `json:"cni"`   // pod network: none (bring your own), bridge
	Nodes []string `json:"nodes"`
	Port  int      `json:"port"`  // of the API server on 127.0.0.1
	DNS   int      `json:"dns"`   // replicas of CoreDNS
	Whole bool     `json:"whole"` // false while Up has not ended well
}

// Cluster is one sandbox.
type Cluster struct {
	Config
	Dir    string
	Say    func(format string, args ...any)
	cache  build.Cache
	layout *cgroup.Layout
	lock   *os.File
}

// ErrNotUp is returned for a sandbox that does not exist.
var ErrNotUp = errors.New("not up")

// New prepares a sandbox that may or may not exist.
func New(name string, say func(string, ...any)) (*Cluster, error) {
	if err := plan.CheckName(name); err != nil {
		return nil, err
	}
	if os.Getuid() != 0 {
		return nil, errors.New("a sandbox is made of namespaces and cgroups: run this as root")
	}
	layout, err := cgroup.Detect()
	if err != nil {
		return nil, err
	}
	return &Cluster{
		Config: Config{Name: name},
		Dir:    filepath.Join(StateDir, name), Say: say, cache: CacheDir, layout: layout,
	}, nil
}

// Open loads a sandbox that exists.
func Open(name string, say func(string, ...any)) (*Cluster, error) {
	c, err := New(name, say)
	if err != nil {
		return nil, err
	}
	if err := c.load(); err != nil {
		return nil, err
	}
	return c, nil
}

func (c *Cluster) load() error {
	b, err := os.ReadFile(c.path("config.json"))
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("sandbox %q is %w: start it with `sandbox up%s`", c.Name, ErrNotUp, c.nameFlag())
	}
	if err != nil {
		return err
	}
	if err := json.Unmarshal(b, &c.Config); err != nil {
		return fmt.Errorf("%s: %w; clean up with `sandbox down%s`", c.path("config.json"), err, c.nameFlag())
	}
	return nil
}

func (c *Cluster) save() error {
	b, err := json.MarshalIndent(c.Config, "", "  ")
	if err != nil {
		return err
	}
	f := c.path("config.json")
	if err := os.WriteFile(f+".new", append(b, '\n'), 0o644); err != nil {
		return err
	}
	return os.Rename(f+".new", f)
}

// DefaultName of a sandbox.
const DefaultName = "lash"

func (c *Cluster) nameFlag() string {
	if c.Name == DefaultName {
		return ""
	}
	return " --name " + c.Name
}

func (c *Cluster) path(elem ...string) string {
	return filepath.Join(append([]string{c.Dir}, elem...)...)
}
func (c *Cluster) pki() pki.Dir                 { return pki.Dir(c.path("pki")) }
func (c *Cluster) cgroup(host string) string    { return cgroupRoot + "/" + c.Name + "/" + host }
func (c *Cluster) netns(host string) string     { return plan.Netns(c.Name, host) }
func (c *Cluster) netnsPath(host string) string { return filepath.Join(netnsDir, c.netns(host)) }
func (c *Cluster) pidfile(name string) string   { return c.path("pid", name) }
func (c *Cluster) process(name string) proc.Ref { return proc.Read(c.pidfile(name)) }
func (c *Cluster) logfile(name string) string   { return c.path("log", name+".log") }
func (c *Cluster) nodeDir(node string) string   { return c.path("nodes", node) }

// HasNode says whether the sandbox has a node of this name, and if not, which it has.
func (c *Cluster) HasNode(name string) error {
	if slices.Contains(c.Nodes, name) {
		return nil
	}
	return fmt.Errorf("sandbox %q has no node %q; it has %s", c.Name, name, strings.Join(c.Nodes, ", "))
}

// ErrBusy is returned by TryLock while another command has the lock.
var ErrBusy = errors.New("another sandbox command is at work")

// TryLock keeps other invocations from changing this sandbox at the same time. The directory itself is
// locked, so nothing is left behind and a lock dies with its holder.
func (c *Cluster) TryLock() error {
	for {
		f, err := os.Open(c.Dir)
		if err != nil {
			return err
		}
		err = syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
		if err == nil && sameFile(f, c.Dir) {
			c.lock = f
			return nil
		}
		f.Close()
		if errors.Is(err, syscall.EWOULDBLOCK) {
			return fmt.Errorf("%w on %q: wait until it has ended, or end it", ErrBusy, c.Name)
		}
		if err != nil {
			return fmt.Errorf("lock %s: %w", c.Dir, err)
		}
	}
}

// Lock is TryLock that waits for its turn.
func (c *Cluster) Lock(ctx context.Context) error {
	for told := false; ; {
		err := c.TryLock()
		if !errors.Is(err, ErrBusy) {
			return err
		}
		if !told {
			c.Say("waiting for another sandbox command on %q to end", c.Name)
			told = true
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// Unlock ends TryLock and Lock.
func (c *Cluster) Unlock() {
	if c.lock != nil {
		c.lock.Close()
		c.lock = nil
	}
}

// sameFile is false when path was removed, or made again, after f was opened.
func sameFile(f *os.File, path string) bool {
	a, err1 := f.Stat()
	b, err2 := os.Stat(path)
	return err1 == nil && err2 == nil && os.SameFile(a, b)
}

// Exists says whether anything of the sandbox is on the machine, and names what.
func (c *Cluster) Exists() []string {
	var found []string
	if _, err := os.Stat(c.Dir); err == nil {
		found = append(found, "directory "+c.Dir)
	}
	if c.layout.Exists(cgroupRoot + "/" + c.Name) {
		found = append(found, fmt.Sprintf("cgroup %s/%s with %d processes", cgroupRoot, c.Name, len(c.layout.Pids(cgroupRoot+"/"+c.Name))))
	}
	for _, ns := range listNetns(c.Name) {
		found = append(found, "network namespace "+ns)
	}
	return found
}

// Names lists the sandboxes of which anything is on the machine.
func Names() []string {
	set := map[string]bool{}
	if entries, err := os.ReadDir(StateDir); err == nil {
		for _, e := range entries {
			set[e.Name()] = plan.CheckName(e.Name()) == nil
		}
	}
	if layout, err := cgroup.Detect(); err == nil {
		for _, h := range layout.Hierarchies {
			entries, err := os.ReadDir(filepath.Join(h.Mount, cgroupRoot))
			for _, e := range entries {
				if err == nil && e.IsDir() {
					set[e.Name()] = plan.CheckName(e.Name()) == nil
				}
			}
		}
	}
	if entries, err := os.ReadDir(netnsDir); err == nil {
		for _, e := range entries {
			if s, _, ok := plan.ParseNetns(e.Name()); ok {
				set[s] = true
			}
		}
	}
	var names []string
	for n, ok := range set {
		if ok {
			names = append(names, n)
		}
	}
	slices.Sort(names)
	return names
}

// poll calls ok until it is true, and returns its error then; else the error says what did not happen.
func poll(ctx context.Context, limit time.Duration, what string, ok func() (bool, error)) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	var last error
	for {
		done, err := ok()
		if done {
			return err
		}
		if err != nil {
			last = err
		}
		select {
		case <-ctx.Done():
			if errors.Is(ctx.Err(), context.Canceled) {
				return ctx.Err()
			}
			if last != nil {
				return fmt.Errorf("%s: not within %s: %w", what, limit, last)
			}
			return fmt.Errorf("%s: not within %s", what, limit)
		case <-time.After(50 * time.Millisecond):
		}
	}
}
