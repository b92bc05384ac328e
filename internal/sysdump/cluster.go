// SPDX-License-Identifier: Apache-2.0

package sysdump

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/kubernetes"
)

// Cluster is where everything is collected from.
type Cluster struct {
	Namespace string // of Lash
	Objects   dynamic.Interface
	Client    kubernetes.Interface
	// Node writes the stream of one agent's node, as NewStream makes it.
	Node func(ctx context.Context, pod *corev1.Pod, out io.Writer) error
}

// Options say how much is collected.
type Options struct {
	Nodes      []string  // empty: all
	LogsSince  time.Time // zero: from their beginning
	LogsLimit  int64     // bytes a log
	Quick      bool      // without connections and logs of before a restart
	Workers    int       // at once
	Timeout    time.Duration
	Progress   func(done, all int, what string)
	AgentLabel string // selects the agents' pods
	OtherLabel string // selects the other pods whose logs are wanted: the operator's
}

// resource is a kind of objects, or one of them.
type resource struct {
	file      string
	gvr       schema.GroupVersionResource
	namespace string // empty: of the cluster, or of all namespaces
	name      string // empty: all
}

// resources are the objects Lash acts on or is made of. Secrets are not among them, nor is what Helm remembers, which is in
// Secrets.
func resources(namespace string) []resource {
	all := func(group, version, name string) resource {
		return resource{file: "cluster/" + name + ".json", gvr: schema.GroupVersionResource{Group: group, Version: version, Resource: name}}
	}
	own := func(group, version, kind, name string) resource {
		r := all(group, version, kind)
		r.file, r.namespace, r.name = "cluster/"+kind+"-"+name+".json", namespace, name
		return r
	}
	out := []resource{
		all("", "v1", "nodes"), all("", "v1", "namespaces"), all("", "v1", "pods"), all("", "v1", "services"), all("", "v1", "events"),
		all("discovery.k8s.io", "v1", "endpointslices"), all("networking.k8s.io", "v1", "networkpolicies"),
		own("", "v1", "configmaps", "lash-config"), own("apps", "v1", "daemonsets", "lash"), own("apps", "v1", "deployments", "lash-operator"),
		own("coordination.k8s.io", "v1", "leases", "lash-operator-resource-lock"),
	}
	for _, kind := range []string{"ciliumnodes", "ciliumidentities", "ciliumendpoints", "ciliumnetworkpolicies", "ciliumclusterwidenetworkpolicies"} {
		out = append(out, all("cilium.io", "v2", kind))
	}
	return out
}

// Collect fills the archive. It returns an error only if it could not begin: what fails later is in the archive.
func (c Cluster) Collect(ctx context.Context, a *Archive, o Options) error {
	listed, err := c.Client.CoreV1().Pods(c.Namespace).List(ctx, metav1.ListOptions{LabelSelector: o.AgentLabel})
	if err != nil {
		return fmt.Errorf("find the agents: %w", err)
	}
	wanted := func(node string) bool { return len(o.Nodes) == 0 || slices.Contains(o.Nodes, node) }
	agents := slices.DeleteFunc(listed.Items, func(p corev1.Pod) bool { return !wanted(p.Spec.NodeName) })
	others, err := c.Client.CoreV1().Pods(c.Namespace).List(ctx, metav1.ListOptions{LabelSelector: o.OtherLabel})
	if err != nil {
		a.Fail("logs/"+o.OtherLabel, err)
		others = &corev1.PodList{}
	}
	c.nodesWithoutAgent(ctx, a, agents, wanted, o)

	type job struct {
		what string
		do   func(context.Context)
	}
	jobs := []job{{"version of the API server", func(ctx context.Context) { a.Collect(ctx, o.Timeout, Part{"cluster/version.json", c.version}) }}}
	for i := range agents {
		jobs = append(jobs, job{"node " + agents[i].Spec.NodeName, func(ctx context.Context) { c.node(ctx, a, &agents[i], o) }})
	}
	for _, r := range resources(c.Namespace) {
		jobs = append(jobs, job{r.file, func(ctx context.Context) {
			a.Collect(ctx, o.Timeout, Part{r.file, func(ctx context.Context) ([]byte, error) { return c.objects(ctx, r) }})
		}})
	}
	for _, p := range slices.Concat(agents, others.Items) {
		jobs = append(jobs, job{"logs of " + p.Name, func(ctx context.Context) { c.logs(ctx, a, &p, o) }})
	}

	queue := make(chan job)
	var workers sync.WaitGroup
	var mu sync.Mutex
	done := 0
	for range max(1, o.Workers) {
		workers.Go(func() {
			for j := range queue {
				j.do(ctx)
				mu.Lock()
				done++
				o.Progress(done, len(jobs), j.what)
				mu.Unlock()
			}
		})
	}
	for _, j := range jobs {
		queue <- j
	}
	close(queue)
	workers.Wait()
	return nil
}

// nodesWithoutAgent names the nodes, of those that are wanted, that have no agent's pod.
func (c Cluster) nodesWithoutAgent(ctx context.Context, a *Archive, agents []corev1.Pod, wanted func(string) bool, o Options) {
	nodes, err := c.Client.CoreV1().Nodes().List(ctx, metav1.ListOptions{})
	if err != nil {
		a.Fail("nodes", err)
		return
	}
	known := map[string]bool{}
	for _, n := range nodes.Items {
		known[n.Name] = true
		if wanted(n.Name) && !slices.ContainsFunc(agents, func(p corev1.Pod) bool { return p.Spec.NodeName == n.Name }) {
			a.Fail("nodes/"+n.Name, fmt.Errorf("no agent's pod runs there"))
		}
	}
	for _, n := range o.Nodes {
		if !known[n] {
			a.Fail("nodes/"+n, fmt.Errorf("there is no such node"))
		}
	}
}

// node collects what the agent's pod of a node can see.
func (c Cluster) node(ctx context.Context, a *Archive, pod *corev1.Pod, o Options) {
	ctx, cancel := context.WithTimeout(ctx, o.Timeout)
	defer cancel()
	dir := "nodes/" + pod.Spec.NodeName
	r, w := io.Pipe()
	go func() { w.CloseWithError(c.Node(ctx, pod, w)) }()
	_, err := a.Merge(dir, r)
	r.Close() // so that a node whose answer makes no sense is not waited for
	if err != nil {
		a.Fail(dir, err)
	}
}

func (c Cluster) version(context.Context) ([]byte, error) {
	v, err := c.Client.Discovery().ServerVersion()
	if err != nil {
		return nil, err
	}
	return json.Marshal(v)
}

// pageSize is how many objects are asked for at once.
const pageSize = 500

func (c Cluster) objects(ctx context.Context, r resource) ([]byte, error) {
	objects := c.Objects.Resource(r.gvr)
	if r.name != "" {
		o, err := objects.Namespace(r.namespace).Get(ctx, r.name, metav1.GetOptions{})
		if err != nil {
			return nil, err
		}
		return json.Marshal(o)
	}
	list := &unstructured.UnstructuredList{}
	opts := metav1.ListOptions{Limit: pageSize}
	for {
		page, err := objects.List(ctx, opts)
		if apierrors.IsNotFound(err) {
			return nil, fmt.Errorf("the cluster has no %s", r.gvr.GroupResource())
		}
		if err != nil {
			return nil, err
		}
		if list.Object == nil {
			list.Object = page.Object
		}
		list.Items = append(list.Items, page.Items...)
		if opts.Continue = page.GetContinue(); opts.Continue == "" {
			return json.Marshal(list)
		}
	}
}

// logs collects the logs of all containers of a pod, and of their predecessors.
func (c Cluster) logs(ctx context.Context, a *Archive, pod *corev1.Pod, o Options) {
	for _, s := range slices.Concat(pod.Status.InitContainerStatuses, pod.Status.ContainerStatuses) {
		for _, previous := range []bool{false, true} {
			if previous && (s.RestartCount == 0 || o.Quick) {
				continue
			}
			opts := corev1.PodLogOptions{Container: s.Name, Previous: previous, Timestamps: true}
			if o.LogsLimit > 0 {
				opts.LimitBytes = &o.LogsLimit
			}
			if !o.LogsSince.IsZero() {
				opts.SinceTime = &metav1.Time{Time: o.LogsSince}
			}
			name := fmt.Sprintf("logs/%s-%s.log", pod.Name, s.Name)
			if previous {
				name = strings.TrimSuffix(name, ".log") + "-previous.log"
			}
			a.Collect(ctx, o.Timeout, Part{name, func(ctx context.Context) ([]byte, error) {
				b, err := c.Client.CoreV1().Pods(pod.Namespace).GetLogs(pod.Name, &opts).DoRaw(ctx)
				return bytes.Clone(b), err
			}})
		}
	}
}
