// SPDX-License-Identifier: Apache-2.0

package endpoint_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/lash-net/lash/internal/cni"
	"github.com/lash-net/lash/internal/datapath/netdev"
	"github.com/lash-net/lash/internal/endpoint"
	"github.com/lash-net/lash/internal/model"
	"github.com/lash-net/lash/internal/state"
	"github.com/lash-net/lash/internal/testutil"
)

var (
	router4 = netip.MustParseAddr("10.0.2.1")
	router6 = netip.MustParseAddr("fd00::201")
)

// faults are the steps that are to fail. The plugin's system calls tell the race detector nothing, so it has its own lock.
type faults struct {
	mu    sync.Mutex
	steps map[string]error
}

var errInjected = errors.New("injected")

func (f *faults) set(steps ...string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.steps = map[string]error{}
	for _, step := range steps {
		f.steps[step] = errInjected
	}
}

func (f *faults) at(step string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.steps[step]
}

// addresses hands out one address after the other; it fails on request.
type addresses struct {
	mu    sync.Mutex
	next  uint8
	inUse map[netip.Addr]string
	*faults
}

func (a *addresses) Allocate(owner string) (v4, v6 netip.Addr, err error) {
	if err := a.at("allocate"); err != nil {
		return v4, v6, err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	for range 256 {
		a.next++
		v4 = netip.AddrFrom4([4]byte{10, 0, 2, a.next})
		if _, used := a.inUse[v4]; a.next > 1 && !used {
			v6 = netip.AddrFrom16([16]byte{0: 0xfd, 14: 2, 15: a.next})
			a.inUse[v4], a.inUse[v6] = owner, owner
			return v4, v6, nil
		}
	}
	return v4, v6, errors.New("no address left")
}

func (a *addresses) Reserve(addr netip.Addr, owner string) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if other, used := a.inUse[addr]; used {
		return fmt.Errorf("address %s belongs to %s", addr, other)
	}
	a.inUse[addr] = owner
	return nil
}

func (a *addresses) Release(addrs ...netip.Addr) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, addr := range addrs {
		delete(a.inUse, addr)
	}
}

func (a *addresses) used() int {
	a.mu.Lock()
	defer a.mu.Unlock()
	return len(a.inUse)
}

// datapath remembers what is attached and, as the reconcile loop would, has on Sync the rows of the table.
type datapath struct {
	mu       sync.Mutex
	tables   *state.Tables
	attached map[string]int
	rows     map[netip.Addr]uint16

	*faults
}

func (d *datapath) AttachPod(ifindex int, ifname string) error {
	if err := d.at("attach"); err != nil {
		return err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.attached[ifname] = ifindex
	return nil
}

func (d *datapath) DetachPod(_ int, ifname string) error {
	if err := d.at("detach"); err != nil {
		return err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	delete(d.attached, ifname)
	return nil
}

func (d *datapath) Attached(ifindex int, ifname string) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.attached[ifname] != ifindex {
		return fmt.Errorf("no programs on %s", ifname)
	}
	return nil
}

func (d *datapath) Sync(_ context.Context, addrs ...netip.Addr) error {
	if err := d.at("sync"); err != nil {
		return err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	wanted := map[netip.Addr]uint16{}
	for ep := range d.tables.Endpoints.All(d.tables.DB.ReadTxn()) {
		for _, addr := range ep.Addrs() {
			wanted[addr] = ep.ID
		}
	}
	for _, addr := range addrs {
		if id, ok := wanted[addr]; ok {
			d.rows[addr] = id
		} else {
			delete(d.rows, addr)
		}
	}
	return nil
}

// devices is netdev with a look at each step: a device that is up must have programs and rows.
type devices struct {
	*netdev.Host
	t  testing.TB
	dp *datapath

	*faults
	sabotage atomic.Pointer[string] // a command to run in the pod before it starts
}

func (d *devices) CreatePod(ctx context.Context, netns *os.File, ep model.Endpoint, network model.PodNetwork) (model.Endpoint, error) {
	if err := d.at("create"); err != nil {
		return ep, err
	}
	return d.Host.CreatePod(ctx, netns, ep, network)
}

func (d *devices) StartPod(ctx context.Context, netns *os.File, ep model.Endpoint, network model.PodNetwork) error {
	d.dp.mu.Lock()
	for _, addr := range ep.Addrs() {
		if d.dp.rows[addr] != ep.ID || d.dp.attached[ep.IfName] != ep.Ifindex {
			d.t.Errorf("%s is to go up without rows or programs", ep.IfName)
		}
	}
	d.dp.mu.Unlock()
	if command := d.sabotage.Load(); command != nil {
		testutil.In(d.t, netns, "sh", "-ec", *command)
	}
	if err := d.Host.StartPod(ctx, netns, ep, network); err != nil {
		return err
	}
	return d.at("start")
}

func (d *devices) DeletePod(ctx context.Context, ifname string) error {
	if err := d.at("delete"); err != nil {
		return err
	}
	return d.Host.DeletePod(ctx, ifname)
}

// node is a node with an agent that can be stopped and started again.
type node struct {
	t      testing.TB
	ns     *os.File
	dir    string
	addrs  *addresses
	dp     *datapath
	devs   *devices
	faults *faults

	routeMTU  int // of the network that an agent starts with
	tables    *state.Tables
	endpoints *endpoint.Endpoints
	stop      func()
}

func newNode(t testing.TB) *node {
	t.Helper()
	ns := testutil.Netns(t)
	host, err := netdev.OpenHostAt(testutil.NetnsPath(ns))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { host.Close() })
	f := &faults{}
	dp := &datapath{attached: map[string]int{}, rows: map[netip.Addr]uint16{}, faults: f}
	n := &node{t: t, ns: ns, dir: t.TempDir(), faults: f, dp: dp, devs: &devices{Host: host, t: t, dp: dp, faults: f}}
	n.start()
	t.Cleanup(func() { n.stop() })
	return n
}

func (n *node) path(name string) string { return filepath.Join(n.dir, name) }

// start is an agent with nothing in its memory.
func (n *node) start() {
	n.t.Helper()
	tables, err := state.New()
	if err != nil {
		n.t.Fatal(err)
	}
	n.addrs = &addresses{inUse: map[netip.Addr]string{router4: "router", router6: "router"}, faults: n.faults}
	n.tables, n.dp.tables = tables, tables
	n.endpoints, err = endpoint.New(endpoint.Config{
		Tables: tables, Addresses: n.addrs, Devices: n.devs, Inventory: n.devs, Programs: n.dp, Rows: n.dp,
		Network: func() (model.PodNetwork, error) {
			return model.PodNetwork{Router4: router4, Router6: router6, MTU: 1500, RouteMTU: n.routeMTU}, n.faults.at("network")
		},
		Socket: n.path("cni.sock"), StateDir: n.path("state"), Deletions: n.path("deletions"), Log: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		n.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- n.endpoints.Run(ctx) }()
	n.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-ended; err != nil {
			n.t.Errorf("run: %v", err)
		}
		if err := tables.Stop(); err != nil {
			n.t.Error(err)
		}
	})
	select {
	case <-n.endpoints.Restored():
	case <-time.After(10 * time.Second):
		n.t.Fatal("not restored")
	}
}

// result is what a runtime sees.
type result struct {
	status int
	output string

	CNIVersion string
	Interfaces []cni.Interface
	IPs        []cni.IP
	Routes     []cni.Route
	Code       int
	Msg        string
	Details    string
}

func (r result) text() string { return r.Msg + "; " + r.Details }

// conf is a configuration as a runtime passes it to the plugin; more is merged into it.
func (n *node) conf(version string, more map[string]any) []byte {
	conf := map[string]any{
		"cniVersion": version, "name": "lash", "type": "lash-cni", "socket": n.path("cni.sock"), "deletions": n.path("deletions"),
		"cniVersions": cni.SupportedVersions, "runtimeConfig": map[string]any{"portMappings": []any{}}, // unknown keys
	}
	for key, value := range more {
		conf[key] = value
	}
	data, err := json.Marshal(conf)
	if err != nil {
		n.t.Fatal(err)
	}
	return data
}

func podEnv(command, container string, netns *os.File) map[string]string {
	env := map[string]string{
		"CNI_COMMAND": command, "CNI_CONTAINERID": container, "CNI_IFNAME": "eth0", "CNI_PATH": "/opt/cni/bin",
		"CNI_ARGS": "IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME=" + container + ";K8S_POD_INFRA_CONTAINER_ID=" + container + ";K8S_POD_UID=u-" + container,
	}
	if netns != nil {
		env["CNI_NETNS"] = testutil.NetnsPath(netns)
	}
	return env
}

func runPlugin(t testing.TB, env map[string]string, stdin []byte) result {
	t.Helper()
	var stdout, stderr bytes.Buffer
	res := result{status: cni.Plugin{
		Getenv: func(key string) string { return env[key] }, Stdin: bytes.NewReader(stdin), Stdout: &stdout, Stderr: &stderr,
	}.Run()}
	res.output = stdout.String()
	if stdout.Len() > 0 {
		if err := json.Unmarshal(stdout.Bytes(), &res); err != nil {
			t.Fatalf("output %q: %v", res.output, err)
		}
	}
	return res
}

func (n *node) call(command, container string, netns *os.File) result {
	n.t.Helper()
	return runPlugin(n.t, podEnv(command, container, netns), n.conf("1.1.0", nil))
}

func (n *node) add(container string, netns *os.File) result {
	n.t.Helper()
	res := n.call("ADD", container, netns)
	if res.status != 0 {
		n.t.Fatalf("ADD %s: %s", container, res.text())
	}
	return res
}

// left is everything of pods that is still there, in words.
func (n *node) left() string {
	n.t.Helper()
	var left []string
	links, err := n.devs.PodLinks(context.Background())
	if err != nil {
		n.t.Fatal(err)
	}
	for name := range links {
		left = append(left, "device "+name)
	}
	n.dp.mu.Lock()
	for name := range n.dp.attached {
		left = append(left, "programs of "+name)
	}
	for addr := range n.dp.rows {
		left = append(left, "row of "+addr.String())
	}
	n.dp.mu.Unlock()
	for ep := range n.tables.Endpoints.All(n.tables.DB.ReadTxn()) {
		left = append(left, fmt.Sprintf("endpoint %d %s", ep.ID, ep.State))
	}
	if used := n.addrs.used(); used != 2 {
		left = append(left, fmt.Sprintf("%d addresses", used-2))
	}
	for _, dir := range []string{"state/endpoints", "deletions"} {
		entries, err := os.ReadDir(n.path(dir))
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			n.t.Fatal(err)
		}
		for _, entry := range entries {
			left = append(left, dir+"/"+entry.Name())
		}
	}
	return strings.Join(left, ", ")
}
