// SPDX-License-Identifier: Apache-2.0

package demo

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os/exec"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/lash-net/lash/sandbox/plan"
	"github.com/lash-net/lash/sandbox/testbed"
)

// How long agents and the API server stay away, and how long a step may take besides.
const (
	agentAway    = 30 * time.Second
	apiAway      = 60 * time.Second
	stepPatience = 90 * time.Second
)

// awayLabel on a node keeps the agent off it, once the DaemonSet has been told so.
const awayLabel = "lash-sandbox/agent"

// resilience is one story: whatever happens to agents, nodes and the API server, the pods of n1 and n2 go on talking,
// the cluster converges, and nothing of what is gone remains on a node.
type resilience struct {
	*world
	o              Options
	diary          diary
	since          time.Time // the agents or the API server went away
	passed, failed int
}

type step struct {
	name string
	do   func(context.Context) error
}

func checkResilience(ctx context.Context, w *world, o Options) (passed, failed int) {
	r := &resilience{world: w, o: o}
	defer r.tidy(context.WithoutCancel(ctx))
	probes, err := r.startProbes(ctx)
	if err != nil {
		r.report("probes start", err)
		return r.passed, r.failed
	}
	for _, s := range r.steps() {
		r.run(ctx, s)
		if ctx.Err() != nil {
			r.report("resilience", errors.New("interrupted"))
			for _, p := range probes {
				_, _ = p.stop()
			}
			return r.passed, r.failed
		}
	}
	before := r.failed
	for _, p := range probes {
		result, err := p.stop()
		if err == nil {
			err = result.verdict(&r.diary)
		}
		name := p.name
		if err == nil {
			name = fmt.Sprintf("%s: nothing lost in all of this (%d messages, longest gap %.0f ms)", p.name, result.Sent, result.MaxGapMS)
		}
		r.report(name, err)
		if result.Overflowed > 0 {
			o.Say("%d messages or answers came while their reader was not given the CPU: they arrived, but were not read", result.Overflowed)
		}
	}
	for _, n := range []string{"n1", "n2"} {
		if drops, err := r.lashOn(ctx, n, "bpf", "metrics", "list"); r.failed > before && err == nil {
			o.Say("lash bpf metrics list on %s:\n%s", n, drops)
		}
	}
	for _, s := range []step{
		{"all nodes restarted at once: every pod comes back by itself", r.restartAll},
		{"all nodes restarted at once: nothing of before remains", r.leftovers},
	} {
		r.run(ctx, s)
	}
	if n := len(r.c.Nodes); n != nodes {
		r.report("all checks again", fmt.Errorf("the cluster has %d nodes, not %d: see above", n, nodes))
		return r.passed, r.failed
	}
	o.Say("all checks again, on the restarted nodes")
	p, f := runChecks(ctx, r.checks(o), o)
	return r.passed + p, r.failed + f
}

// tidy takes away what a story that ended early has left, so that the cluster can be used again.
func (r *resilience) tidy(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	_ = r.kubectl(ctx, "label", "node", "--all", awayLabel+"-")
	_ = r.kubectl(ctx, "-n", "demo", "delete", "pod/early", "pod/late", "service/after", "--ignore-not-found", "--wait=false")
}

func (r *resilience) steps() []step {
	return []step{
		{"agents restarted by a rollout", r.rollout},
		{"agent of n1 killed with -9: the kubelet restarts it", func(ctx context.Context) error { return r.killAndWait(ctx, "n1") }},
		{"agents of n1 and n2 killed with -9, and absent", r.absence},
		{"agents absent: a new pod fails with an error that names the agent and the remedy", r.newPodFails},
		{"agents absent: new connections", r.newConnections},
		{"agents absent: a pod ends, a node joins", r.changeBehindTheirBack},
		{"agents absent for 30 s: they start", r.comeBack},
		{"agents back: the pod that failed starts", func(ctx context.Context) error { return r.waitPod(ctx, "late") }},
		{"agents back: the new node is connected", r.newNodeIsConnected},
		{"agents back: nothing of the pod that ended remains", r.leftovers},
		{"programs replaced, by others for legacy host routing", func(ctx context.Context) error { return r.replacePrograms(ctx, "Legacy") }},
		{"programs replaced, by others for BPF host routing", func(ctx context.Context) error { return r.replacePrograms(ctx, "BPF") }},
		{"node n3 removed", func(ctx context.Context) error { return r.c.RemoveNode(ctx, "n3") }},
		{"node n3 removed: nothing of it or its pods remains on the others", r.leftovers},
		{"another node n3 added, n4 removed", r.swapNodes},
		{"another node n3 added, n4 removed: nothing of n4 or its pods remains", r.leftovers},
		{"API server stopped; an agent killed with -9 becomes ready without it", r.apiServerAway},
		{"API server away: new connections, service and DNS", r.newConnections},
		{"API server away for a minute: agents follow it when it is back", r.apiServerBack},
		{"API server back: nothing lost, nothing left", r.leftovers},
	}
}

// run does one step and reports it.
func (r *resilience) run(ctx context.Context, s step) {
	r.diary.write(s.name)
	start := time.Now()
	ctx, cancel := context.WithTimeout(ctx, apiAway+stepPatience)
	defer cancel()
	r.report(s.name, s.do(ctx))
	if took := time.Since(start); took > 10*time.Second {
		r.o.Say("that took %.0f s", took.Seconds())
	}
}

func (r *resilience) report(name string, err error) {
	if err != nil {
		r.failed++
		fmt.Fprintf(r.o.Out, "FAIL %s: %s\n", name, oneLine(err))
		return
	}
	r.passed++
	fmt.Fprintf(r.o.Out, "ok   %s\n", name)
}

// startProbes starts what must not notice anything: pods of n1 and n2 with each other, and with a machine outside by
// way of masquerading.
func (r *resilience) startProbes(ctx context.Context) ([]*probe, error) {
	dst := r.web["n2"].addrs
	to := func(a netip.Addr) string { return netip.AddrPortFrom(a, 8082).String() }
	var probes []*probe
	for _, p := range []struct {
		name string
		args []string
	}{
		{"ping each ms, pod to pod across nodes, v4", []string{"icmp4", dst["v4"].String()}},
		{"ping each ms, pod to pod across nodes, v6", []string{"icmp6", dst["v6"].String()}},
		{"TCP stream of 8 MB/s, pod to pod across nodes, v4", []string{"-size", "8192", "tcp", to(dst["v4"])}},
		{"TCP stream of 8 MB/s, pod to pod across nodes, v6", []string{"-size", "8192", "tcp", to(dst["v6"])}},
		{"TCP stream, pod to outside, v4", []string{"-interval", "10ms", "tcp", to(plan.Outside4)}},
		{"TCP stream, pod to outside, v6", []string{"-interval", "10ms", "tcp", to(plan.Outside6)}},
	} {
		started, err := r.startProbe(ctx, p.name, "n1", p.args...)
		if err != nil {
			for _, p := range probes {
				_, _ = p.stop()
			}
			return nil, fmt.Errorf("%s: %w", p.name, err)
		}
		probes = append(probes, started)
	}
	return probes, nil
}

var execs atomic.Uint32

// inContainer is a command in a pod that containerd runs: it needs no API server, kubelet or agent.
func (w *world) inContainer(ctx context.Context, node string, p pod, argv ...string) (*exec.Cmd, error) {
	id := fmt.Sprintf("demo-%d-%d", time.Now().UnixNano(), execs.Add(1))
	return w.c.ExecCommand(ctx, node, append([]string{"ctr", "-n", "k8s.io", "tasks", "exec", "--exec-id", id, p.container}, argv...)...)
}

// agentPid is the agent's process on a node, or an error when there is none.
func (r *resilience) agentPid(ctx context.Context, node string) (string, error) {
	out, err := r.c.Exec(ctx, node, "pidof", "-s", "lash-agent")
	return strings.TrimSpace(out), err
}

func (r *resilience) killAgent(ctx context.Context, node string) (pid string, err error) {
	if pid, err = r.agentPid(ctx, node); err != nil {
		return "", fmt.Errorf("no agent to kill: %w", err)
	}
	_, err = r.c.Exec(ctx, node, "kill", "-9", pid)
	return pid, err
}

// waitAgent returns when an agent that is not the one of before is ready.
func (r *resilience) waitAgent(ctx context.Context, node, before string) error {
	return until(ctx, stepPatience, func(ctx context.Context) error {
		pid, err := r.agentPid(ctx, node)
		if err == nil && pid == before {
			err = errors.New("it is the one of before")
		}
		if err == nil {
			_, err = r.c.Exec(ctx, node, "curl", "-sS", "--fail-with-body", "--max-time", "2", "http://127.0.0.1:9879/healthz")
		}
		if err != nil {
			return fmt.Errorf("agent of %s: %w", node, err)
		}
		return nil
	})
}

func (r *resilience) killAndWait(ctx context.Context, node string) error {
	pid, err := r.killAgent(ctx, node)
	if err != nil {
		return err
	}
	return r.waitAgent(ctx, node, pid)
}

func (r *resilience) kubectl(ctx context.Context, args ...string) error {
	_, err := r.c.Kubectl(ctx, args...)
	return err
}

func (r *resilience) rolledOut(ctx context.Context) error {
	return r.kubectl(ctx, "-n", "kube-system", "rollout", "status", "ds/lash", "--timeout=90s")
}

// rollout teaches the DaemonSet to leave nodes with awayLabel, which restarts all agents.
func (r *resilience) rollout(ctx context.Context) error {
	patch := `{"spec":{"template":{"spec":{"affinity":{"nodeAffinity":{"requiredDuringSchedulingIgnoredDuringExecution":{"nodeSelectorTerms":[{"matchExpressions":[{"key":"` +
		awayLabel + `","operator":"DoesNotExist"}]}]}}}}}}}`
	if err := r.kubectl(ctx, "-n", "kube-system", "patch", "ds/lash", "--patch", patch); err != nil {
		return err
	}
	return r.rolledOut(ctx)
}

// absence kills the agents and keeps them away: the label is there before the kubelet has given up on the dead ones.
func (r *resilience) absence(ctx context.Context) error {
	if err := r.createPod(ctx, "early", "n1"); err != nil {
		return err
	}
	if err := r.waitPod(ctx, "early"); err != nil {
		return err
	}
	for _, n := range []string{"n1", "n2"} {
		if _, err := r.killAgent(ctx, n); err != nil {
			return err
		}
	}
	r.since = time.Now()
	if err := r.kubectl(ctx, "label", "node", "n1", "n2", awayLabel+"=away"); err != nil {
		return err
	}
	return until(ctx, stepPatience, r.stillAway)
}

func (r *resilience) stillAway(ctx context.Context) error {
	for _, n := range []string{"n1", "n2"} {
		if pid, err := r.agentPid(ctx, n); err == nil {
			return fmt.Errorf("an agent runs on %s: process %s", n, pid)
		}
	}
	return nil
}

func (r *resilience) createPod(ctx context.Context, name, node string) error {
	_, err := r.c.KubectlInput(ctx, `apiVersion: v1
kind: Pod
metadata: {name: `+name+`, namespace: demo}
spec:
  nodeName: `+node+`
  terminationGracePeriodSeconds: 1
  containers:
  - {name: pause, image: "sandbox.local/toolbox:1", imagePullPolicy: Never, args: [pause]}
`, "apply", "-f", "-")
	return err
}

func (r *resilience) waitPod(ctx context.Context, name string) error {
	err := r.kubectl(ctx, "-n", "demo", "wait", "pod", name, "--for=condition=Ready", "--timeout=60s")
	if err != nil {
		events, _ := r.events(ctx, name)
		err = fmt.Errorf("%w; its events: %s", err, events)
	}
	return err
}

func (r *resilience) events(ctx context.Context, pod string) (string, error) {
	return r.c.Kubectl(ctx, "-n", "demo", "get", "events", "--field-selector=involvedObject.name="+pod, "-o", `jsonpath={range .items[*]}{.reason}: {.message}{"\n"}{end}`)
}

// newPodFails reads what kubectl describe shows.
func (r *resilience) newPodFails(ctx context.Context) error {
	if err := r.createPod(ctx, "late", "n1"); err != nil {
		return err
	}
	return until(ctx, agentAway, func(ctx context.Context) error {
		events, err := r.events(ctx, "late")
		if err != nil {
			return err
		}
		for _, want := range []string{"FailedCreatePodSandBox", "the lash agent on this node is not running", "kubectl -n kube-system get pods -l k8s-app=lash", "the runtime tries again by itself"} {
			if !strings.Contains(events, want) {
				return fmt.Errorf("the events of the pod lack %q: %s", want, events)
			}
		}
		return nil
	})
}

// newConnections are those that no earlier decision covers: to a pod, to a service by its name, to a machine outside.
func (r *resilience) newConnections(ctx context.Context) error {
	var errs []error
	for _, f := range families {
		far, flag := plan.Outside4, "-4"
		if f == "v6" {
			far, flag = plan.Outside6, "-6"
		}
		for what, argv := range map[string][]string{
			"pod to pod":         curl(r.web["n2"].addrs[f], 8080, "/hostname"),
			"service by name":    {"curl", flag, "-sS", "--fail", "--max-time", "5", "http://web.demo/hostname"},
			"outside":            curl(far, 8080, "/clientip"),
			"pod to its own net": curl(r.web["n1"].addrs[f], 8080, "/hostname"),
		} {
			cmd, err := r.inContainer(ctx, "n1", r.client["n1"], argv...)
			if err == nil {
				var out []byte
				if out, err = cmd.CombinedOutput(); err != nil {
					err = fmt.Errorf("%w: %s", err, out)
				}
			}
			if err != nil {
				errs = append(errs, fmt.Errorf("%s, %s: %w", what, f, err))
			}
		}
	}
	return errors.Join(errs...)
}

func (r *resilience) changeBehindTheirBack(ctx context.Context) error {
	if err := r.kubectl(ctx, "-n", "demo", "delete", "pod", "early", "--timeout=60s"); err != nil {
		return err
	}
	if name, err := r.c.AddNode(ctx); err != nil || name != "n4" {
		return fmt.Errorf("add node n4: got %s: %w", name, err)
	}
	return r.stillAway(ctx)
}

func (r *resilience) comeBack(ctx context.Context) error {
	if err := pause(ctx, time.Until(r.since.Add(agentAway))); err != nil {
		return err
	}
	if err := r.stillAway(ctx); err != nil {
		return err
	}
	if err := r.kubectl(ctx, "label", "node", "n1", "n2", awayLabel+"-"); err != nil {
		return err
	}
	return errors.Join(r.waitAgent(ctx, "n1", ""), r.waitAgent(ctx, "n2", ""))
}

func pause(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(d):
		return nil
	}
}

// newNodeIsConnected: n4 joined when the agents of n1 and n2 did not look.
func (r *resilience) newNodeIsConnected(ctx context.Context) error {
	now, err := r.settled(ctx)
	if err != nil {
		return err
	}
	for _, f := range families {
		for _, pair := range [][2]string{{"n4", "n1"}, {"n2", "n4"}} {
			if err := until(ctx, patience, func(ctx context.Context) error {
				out, err := now.in(ctx, now.client[pair[0]], curl(now.web[pair[1]].addrs[f], 8080, "/hostname")...)
				return expect(out, err, now.web[pair[1]].name)
			}); err != nil {
				return fmt.Errorf("%s to %s, %s: %w", pair[0], pair[1], f, err)
			}
		}
	}
	return r.kubectl(ctx, "-n", "demo", "delete", "pod", "late", "--timeout=60s")
}

// settled waits until nodes and workloads are Ready and returns the world as it is then.
func (r *resilience) settled(ctx context.Context) (*world, error) {
	if err := r.c.WaitNodesReady(ctx, stepPatience); err != nil {
		return nil, err
	}
	for _, what := range [][2]string{{"kube-system", "ds/lash"}, {"kube-system", "deploy/coredns"}, {"demo", "ds/web"}, {"demo", "ds/client"}} {
		if err := r.kubectl(ctx, "-n", what[0], "rollout", "status", what[1], "--timeout=90s"); err != nil {
			return nil, fmt.Errorf("%w\n%s", err, testbed.Overview(ctx, r.c))
		}
	}
	now, err := look(ctx, r.c)
	if err != nil {
		return nil, err
	}
	return now, until(ctx, stepPatience, now.published)
}

// published: the backends that Kubernetes has published are the pods there are. Its controllers lag behind for up to a
// minute after the API server was away.
func (w *world) published(ctx context.Context) error {
	want, err := readWanted(ctx, w.c)
	if err != nil {
		return err
	}
	for b, slice := range want.backends {
		for name, n := range want.nodes {
			if _, pod := want.pods[b.Addr()]; !pod && slices.ContainsFunc(n.cidrs, func(c netip.Prefix) bool { return c.Contains(b.Addr()) }) {
				return fmt.Errorf("EndpointSlice %s has backend %s, of no pod of node %s", slice, b, name)
			}
		}
	}
	for _, p := range w.web {
		for _, a := range p.addrs {
			if b := netip.AddrPortFrom(a, 8080); !want.ready[b] {
				return fmt.Errorf("pod %s is no ready backend of its service: %s", p.name, b)
			}
		}
	}
	return nil
}

// replacePrograms upgrades to the other host routing and looks whether the programs that are attached are others.
func (r *resilience) replacePrograms(ctx context.Context, routing string) error {
	before, err := r.programs(ctx, "n1")
	if err != nil {
		return err
	}
	args := []string{"upgrade", "--kubeconfig", r.c.Kubeconfig(false), "--reuse-values", "--set", fmt.Sprintf("bpf.hostLegacyRouting=%t", routing == "Legacy")}
	if out, err := exec.CommandContext(ctx, r.o.Lash, args...).CombinedOutput(); err != nil {
		return fmt.Errorf("lash %s: %w: %s", strings.Join(args, " "), err, out)
	}
	if routing == "BPF" { // the last rollout: the DaemonSet becomes what the chart says
		if err := r.kubectl(ctx, "-n", "kube-system", "patch", "ds/lash", "--type=json", "--patch", `[{"op":"remove","path":"/spec/template/spec/affinity"}]`); err != nil {
			return err
		}
	}
	if err := r.rolledOut(ctx); err != nil {
		return err
	}
	after, err := r.programs(ctx, "n1")
	if err != nil {
		return err
	}
	for hook, id := range before {
		if after[hook] == id || after[hook] == "" {
			return fmt.Errorf("program of %s was not replaced: id %s, now %q", hook, id, after[hook])
		}
	}
	out, err := r.lashOn(ctx, "n1", "status")
	if err != nil {
		return err
	}
	for line := range strings.Lines(out) {
		if k, v, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(k) == "Host Routing" && strings.HasPrefix(strings.TrimSpace(v), routing) {
			return nil
		}
	}
	return fmt.Errorf("status says nothing of host routing by %s: %s", routing, out)
}

// programs are the ids of what is attached to a node's devices.
func (r *resilience) programs(ctx context.Context, node string) (map[string]string, error) {
	out, err := r.lashOn(ctx, node, "bpf", "net", "list", "-o", "json")
	if err != nil {
		return nil, err
	}
	var t struct {
		Columns []string
		Rows    [][]string
	}
	if err := json.Unmarshal([]byte(out), &t); err != nil {
		return nil, err
	}
	id := slices.Index(t.Columns, "ID")
	if id < 0 || len(t.Rows) == 0 {
		return nil, fmt.Errorf("lash bpf net list: no ids: %s", out)
	}
	ids := map[string]string{}
	for _, row := range t.Rows {
		ids[row[0]+" "+row[2]] = row[id]
	}
	return ids, nil
}

// lashOn runs the agent's own lash on its node.
func (r *resilience) lashOn(ctx context.Context, node string, args ...string) (string, error) {
	return r.c.Exec(ctx, node, "sh", "-c", `exec /proc/$(pidof -s lash-agent)/root/usr/bin/lash `+strings.Join(args, " "))
}

func (r *resilience) apiServerAway(ctx context.Context) error {
	if err := r.c.StopComponent(ctx, "apiserver"); err != nil {
		return err
	}
	r.since = time.Now()
	return r.killAndWait(ctx, "n2")
}

func (r *resilience) apiServerBack(ctx context.Context) error {
	if err := pause(ctx, time.Until(r.since.Add(apiAway))); err != nil {
		return err
	}
	if err := r.c.StartComponent("apiserver"); err != nil {
		return err
	}
	if err := r.c.WaitAPIServer(ctx); err != nil {
		return err
	}
	// Kubelets and controllers take up to a minute to notice, by their own pauses; the agents must not need them.
	if _, err := r.c.KubectlInput(ctx, `apiVersion: v1
kind: Service
metadata: {name: after, namespace: demo}
spec:
  ipFamilyPolicy: RequireDualStack
  ports: [{port: 80}]
`, "apply", "-f", "-"); err != nil {
		return err
	}
	if err := r.leftovers(ctx); err != nil {
		return err
	}
	return r.kubectl(ctx, "-n", "demo", "delete", "service", "after")
}

func (r *resilience) swapNodes(ctx context.Context) error {
	if name, err := r.c.AddNode(ctx); err != nil || name != "n3" {
		return fmt.Errorf("add node n3: got %s: %w", name, err)
	}
	if err := r.c.RemoveNode(ctx, "n4"); err != nil {
		return err
	}
	_, err := r.settled(ctx)
	return err
}

// restartAll is a power failure of all nodes. Their pods come back in other containers.
func (r *resilience) restartAll(ctx context.Context) error {
	if err := r.c.RestartNodes(ctx, r.c.Nodes...); err != nil {
		return err
	}
	start := time.Now()
	if err := r.c.WaitBooted(ctx, stepPatience, r.c.Nodes...); err != nil {
		return err
	}
	before := *r.world
	err := until(ctx, stepPatience, func(ctx context.Context) error {
		now, err := r.settled(ctx)
		if err != nil {
			return err
		}
		for _, n := range r.c.Nodes {
			for _, p := range []struct{ was, is pod }{{before.web[n], now.web[n]}, {before.client[n], now.client[n]}} {
				if p.was.container == p.is.container {
					return fmt.Errorf("pod %s still has the container of before", p.is.name)
				}
			}
		}
		now.history = r.history
		*r.world = *now
		return nil
	})
	if err == nil {
		r.o.Say("all pods are back %.0f s after the boot", time.Since(start).Seconds())
	}
	return err
}
