// SPDX-License-Identifier: Apache-2.0

package demo

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/lash-net/lash/sandbox/plan"
)

// path is a way from a client to a service.
type path struct {
	name     string
	mode     string // of the service: snat or dsr, which ends its name
	nodePort bool   // of n1; else the cluster IP
	program  string // the toolbox, as the client finds it
	run      func(ctx context.Context, argv ...string) (*exec.Cmd, error)
}

// paths are those through which services are reached: from a pod at the socket and packet by packet, and from outside.
func (w *world) paths(ctx context.Context) ([]path, error) {
	// Another pod than the one whose sockets are translated: the kernel gives both kinds of connections of one pod the same
	// ports now and then, and towards a backend they would be one.
	client, beside := w.client["n1"], w.web["n1"]
	pid, err := w.c.Exec(ctx, "n1", "sh", "-c", "ctr -n k8s.io tasks ls | grep '^"+beside.container+" ' | tr -s ' ' | cut -d' ' -f2")
	if pid = strings.TrimSpace(pid); err != nil || pid == "" {
		return nil, fmt.Errorf("find the process of pod %s: %w", beside.name, err)
	}
	accelerated, err := w.acceleration(ctx)
	if err != nil {
		return nil, err
	}
	inPod := func(ctx context.Context, argv ...string) (*exec.Cmd, error) {
		return w.inContainer(ctx, "n1", client, argv...)
	}
	besidePod := func(ctx context.Context, argv ...string) (*exec.Cmd, error) {
		return w.c.BesideCommand(ctx, "n1", pid, argv...)
	}
	outside := func(ctx context.Context, argv ...string) (*exec.Cmd, error) {
		return w.c.ExecCommand(ctx, plan.Outside, argv...)
	}
	return []path{
		{"ClusterIP at the socket", "snat", false, "toolbox", inPod},
		{"ClusterIP per packet", "snat", false, w.c.Toolbox(), besidePod},
		{"NodePort from outside, SNAT" + accelerated, "snat", true, w.c.Toolbox(), outside},
		{"NodePort from outside, DSR" + accelerated, "dsr", true, w.c.Toolbox(), outside},
	}, nil
}

// acceleration is ", XDP" and its mode where n1 serves clients outside by it.
func (w *world) acceleration(ctx context.Context) (string, error) {
	out, err := w.lashOn(ctx, "n1", "status", "--verbose")
	if err != nil {
		return "", err
	}
	for line := range strings.Lines(out) {
		if k, v, ok := strings.Cut(line, "XDP Acceleration:"); ok && strings.TrimSpace(k) == "" {
			if v = strings.TrimSpace(v); strings.HasPrefix(v, "Disabled") {
				return "", nil
			}
			return ", XDP " + v, nil
		}
	}
	return "", fmt.Errorf("status --verbose does not say how clients outside are served: %s", out)
}

// frontends of a service.
type frontends struct {
	ips       map[string]netip.Addr // by family
	ports     map[string]uint16     // by name
	nodePorts map[string]uint16
}

func (w *world) frontendsOf(ctx context.Context, namespace, name string) (frontends, error) {
	f := frontends{map[string]netip.Addr{}, map[string]uint16{}, map[string]uint16{}}
	out, err := w.c.Kubectl(ctx, "-n", namespace, "get", "service", name, "-o", "json")
	if err != nil {
		return f, err
	}
	var svc struct {
		Spec struct {
			ClusterIPs []netip.Addr
			Ports      []struct {
				Name           string
				Port, NodePort uint16
			}
		}
	}
	if err := json.Unmarshal([]byte(out), &svc); err != nil {
		return f, err
	}
	for _, ip := range svc.Spec.ClusterIPs {
		f.ips[family(ip)] = ip
	}
	for _, p := range svc.Spec.Ports {
		f.ports[p.Name], f.nodePorts[p.Name] = p.Port, p.NodePort
	}
	return f, nil
}

// to is where the path's client finds a port of the service.
func (p path) to(f frontends, family, port string) netip.AddrPort {
	if p.nodePort {
		return netip.AddrPortFrom(nodeAddr("n1", family), f.nodePorts[port])
	}
	return netip.AddrPortFrom(f.ips[family], f.ports[port])
}

// start starts a program of the toolbox at the path's client. containerd runs it or this machine does: it needs no API
// server and no agent.
func (p path) start(ctx context.Context, name string, args ...string) (*probe, error) {
	cmd, err := p.run(ctx, append([]string{p.program}, args...)...)
	if err != nil {
		return nil, err
	}
	started := &probe{name: name, cmd: cmd}
	cmd.Stdout, cmd.Stderr = &started.stdout, &started.stderr
	return started, cmd.Start()
}

// loaded is what a load generator saw (toolbox load).
type loaded struct {
	Sent, Failed, Connections            int64
	Failures                             map[string]int64
	FirstFailure                         *failure
	Seconds, P50MS, P99MS, MaxMS, LateMS float64
	Servers                              map[string]int64
}

type failure struct {
	At              time.Time
	To, From, Error string
}

func (l loaded) String() string {
	s := fmt.Sprintf("%d sent (%.0f/s, %d connections, %d servers), %d failed, p50 %.1f ms, p99 %.1f ms, longest %.0f ms (of which the generator itself: p99 %.1f ms)",
		l.Sent, float64(l.Sent)/l.Seconds, l.Connections, len(l.Servers), l.Failed, l.P50MS, l.P99MS, l.MaxMS, l.LateMS)
	for _, k := range slices.Sorted(maps.Keys(l.Failures)) {
		s += fmt.Sprintf("; %d %s", l.Failures[k], k)
	}
	return s
}

// verdict on a load during which nothing was to fail.
func (l loaded) verdict(rate int, d *diary) error {
	switch {
	case l.Failed > 0:
		f := l.FirstFailure
		return fmt.Errorf("%s; the first at %s (%s), %s to %s: %s", l, f.At.Format("15:04:05.000"), d.at(f.At), f.From, f.To, f.Error)
	case float64(l.Sent) < .95*float64(rate)*l.Seconds:
		return fmt.Errorf("%s: too few, %d/s were asked for", l, rate)
	}
	return nil
}

// startLoad sends requests to the port "http" of a service, both families in turn, until it is stopped or the time is over.
func (w *world) startLoad(ctx context.Context, p path, namespace, service string, rate int, flags ...string) (*probe, error) {
	f, err := w.frontendsOf(ctx, namespace, service+"-"+p.mode)
	if err != nil {
		return nil, err
	}
	args := append([]string{"load", "-rate", fmt.Sprint(rate)}, flags...)
	for _, fam := range families {
		args = append(args, fmt.Sprintf("http://%s/hostname", p.to(f, fam, "http")))
	}
	return p.start(ctx, p.name, args...)
}

// endLoad waits for a load's end, which stop brings about, and says what it saw.
func endLoad(p *probe, stop bool) (loaded, error) {
	var l loaded
	if stop {
		_ = p.cmd.Process.Signal(syscall.SIGTERM)
	}
	err := p.cmd.Wait()
	if json.Unmarshal(p.stdout.Bytes(), &l) != nil || l.Sent == 0 {
		return l, errors.Join(fmt.Errorf("%s: the load generator ended without a result: %s %s", p.name, p.stdout.String(), p.stderr.String()), err)
	}
	return l, nil
}
