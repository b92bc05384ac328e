// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"net/netip"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/lash-net/lash/internal/model"
)

const namespace = "load"

// load is the pods.
type load struct {
	c    *cluster
	pods []*pod

	mu   sync.Mutex
	open []*pod // created, and not yet in every ipcache
	fail error
}

type pod struct {
	name    string
	set     string // value of its label app
	node    *node
	addrs   [2]netip.Addr
	created time.Time
	took    time.Duration
	arrived int // of the rows it is to have in ipcaches
}

// newLoad plans the pods: three neighbours in time have the same labels and are on different nodes, so that the agents
// race for every identity.
func newLoad(ctx context.Context, c *cluster) (*load, error) {
	l := &load{c: c}
	for i := range c.o.pods {
		p := &pod{name: fmt.Sprintf("pod-%d", i), set: fmt.Sprintf("app-%d", i/3%c.o.sets), node: c.nodes[i%3]}
		if i/3 < c.o.sets && c.o.pods/3 < c.o.sets { // fewer threes than sets: the rest of the sets once
			p.set = fmt.Sprintf("app-%d", i%c.o.sets)
		}
		p.addrs[0], p.addrs[1] = p.node.take()
		l.pods = append(l.pods, p)
	}
	_, err := c.clientset.CoreV1().Namespaces().Create(ctx, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: namespace}}, metav1.CreateOptions{})
	return l, err
}

// create creates the pods at the rate and returns how long each took to every ipcache, and how long creating took.
func (l *load) create(ctx context.Context) ([]time.Duration, time.Duration, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	watched := make(chan error, 1)
	go func() { watched <- l.watch(ctx) }()
	began := time.Now()
	var writes sync.WaitGroup
	for i, p := range l.pods {
		at := began.Add(time.Duration(float64(i) / l.c.o.rate * float64(time.Second)))
		select {
		case <-ctx.Done():
			return nil, 0, ctx.Err()
		case err := <-watched:
			return nil, 0, err
		case <-time.After(time.Until(at)):
		}
		writes.Go(func() {
			if err := l.createOne(ctx, p); err != nil {
				l.mu.Lock()
				l.fail = err
				l.mu.Unlock()
			}
		})
		if l.c.o.restart && i == len(l.pods)/2 {
			say("the agent of %s is killed and started again", l.c.nodes[1].name)
			l.c.nodes[1].agent.kill()
			if err := l.c.startAgent(ctx, l.c.nodes[1]); err != nil {
				return nil, 0, err
			}
		}
	}
	writes.Wait()
	took := time.Since(began)
	if err := <-watched; err != nil {
		return nil, 0, err
	}
	var out []time.Duration
	for _, p := range l.pods {
		out = append(out, p.took)
	}
	return out, took, nil
}

// createOne does what scheduler and kubelet do to the API: the pod is bound and gets its addresses.
func (l *load) createOne(ctx context.Context, p *pod) error {
	pods := l.c.clientset.CoreV1().Pods(namespace)
	p.created = time.Now()
	l.mu.Lock()
	l.open = append(l.open, p)
	l.mu.Unlock()
	obj := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: p.name, Labels: map[string]string{"app": p.set, "pod-template-hash": p.name}},
		Spec:       corev1.PodSpec{NodeName: p.node.name, Containers: []corev1.Container{{Name: "c", Image: "none", Ports: []corev1.ContainerPort{{Name: "http", ContainerPort: 80}}}}},
	}
	obj, err := pods.Create(ctx, obj, metav1.CreateOptions{})
	if err != nil {
		return fmt.Errorf("create %s: %w", p.name, err)
	}
	obj.Status.HostIP, obj.Status.PodIP = p.node.Addr4.String(), p.addrs[0].String()
	for _, a := range p.addrs {
		obj.Status.PodIPs = append(obj.Status.PodIPs, corev1.PodIP{IP: a.String()})
	}
	if _, err := pods.UpdateStatus(ctx, obj, metav1.UpdateOptions{}); err != nil {
		return fmt.Errorf("addresses of %s: %w", p.name, err)
	}
	return nil
}

// perTick bounds how many pods are looked for each time. When more are late, looking for all of them would take the CPU
// that they wait for; each then counts as late until its turn comes.
const perTick = 100

// watch asks every ipcache for the addresses of pods that are on their way, until all have arrived.
func (l *load) watch(ctx context.Context) error {
	const patience = 60 * time.Second
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	said := time.Now()
	var open []*pod
	for arrived := 0; arrived < len(l.pods); {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-tick.C:
		}
		l.mu.Lock()
		fail := l.fail
		open = append(open, l.open...)
		l.open = l.open[:0]
		l.mu.Unlock()
		if fail != nil {
			return fail
		}
		look := open[:min(perTick, len(open))]
		open = open[len(look):]
		for _, p := range look {
			switch {
			case l.everywhere(p):
				p.took = time.Since(p.created)
				arrived++
			case time.Since(p.created) > patience:
				return fmt.Errorf("%s on %s is not in every ipcache after %s", p.name, p.node.name, patience)
			default:
				open = append(open, p) // its turn comes after the others'
			}
		}
		if time.Since(said) > 10*time.Second {
			said = time.Now()
			say("%d of %d pods in every ipcache, %d on their way", arrived, len(l.pods), len(open))
		}
	}
	return nil
}

// everywhere goes on where it found nothing the last time: what has arrived stays.
func (l *load) everywhere(p *pod) bool {
	for ; p.arrived < len(l.c.nodes)*len(p.addrs); p.arrived++ {
		if l.c.nodes[p.arrived/len(p.addrs)].identity(p.addrs[p.arrived%len(p.addrs)]) == 0 {
			return false
		}
	}
	return true
}

// check compares the kernels' rows with the CiliumIdentities: how many there are, how many sets of labels have more
// than one, how many rows have not that of their pod's labels.
func (l *load) check(ctx context.Context) (identities, duplicates, wrong int, err error) {
	list, err := l.c.cilium.Identities.List(ctx, metav1.ListOptions{})
	if err != nil {
		return 0, 0, 0, err
	}
	sets, byApp := map[model.Labels]int{}, map[string]map[string]bool{}
	for _, id := range list.Items {
		labels := model.LabelsOf(id.SecurityLabels)
		if sets[labels]++; sets[labels] == 2 {
			duplicates++
		}
		if id.SecurityLabels["k8s:io.kubernetes.pod.namespace"] == namespace {
			app := id.SecurityLabels["k8s:app"]
			if byApp[app] == nil {
				byApp[app] = map[string]bool{}
			}
			byApp[app][id.Name] = true
		}
	}
	for _, p := range l.pods {
		for _, n := range l.c.nodes {
			for _, a := range p.addrs {
				if !byApp[p.set][fmt.Sprint(n.identity(a))] {
					wrong++
				}
			}
		}
	}
	return len(list.Items), duplicates, wrong, nil
}

// remove deletes the pods as a kubelet does at the end, without grace.
func (l *load) remove(ctx context.Context) error {
	now := int64(0)
	var wg sync.WaitGroup
	var mu sync.Mutex
	var first error
	work := make(chan *pod)
	for range 8 {
		wg.Go(func() {
			for p := range work {
				if err := l.c.clientset.CoreV1().Pods(namespace).Delete(ctx, p.name, metav1.DeleteOptions{GracePeriodSeconds: &now}); err != nil {
					mu.Lock()
					first = err
					mu.Unlock()
				}
			}
		})
	}
	for _, p := range l.pods {
		work <- p
	}
	close(work)
	wg.Wait()
	return first
}

// settle waits until nothing is left of the pods and returns what is left of CiliumEndpoints and of ipcache rows.
func (l *load) settle(ctx context.Context, base []int) (endpoints, rows int, err error) {
	began := time.Now()
	err = poll(ctx, 180*time.Second, "the end of the pods", func() (bool, error) {
		list, err := l.c.cilium.Endpoints.List(ctx, metav1.ListOptions{Limit: 500})
		if err != nil {
			return false, nil
		}
		endpoints = len(list.Items)
		if list.RemainingItemCount != nil {
			endpoints += int(*list.RemainingItemCount)
		}
		if endpoints > 0 {
			time.Sleep(200 * time.Millisecond)
			return false, nil
		}
		now, err := l.c.rows()
		if err != nil {
			return false, err
		}
		rows = 0
		for i := range now {
			rows += max(0, now[i]-base[i])
		}
		return rows == 0, nil
	})
	if err != nil && ctx.Err() == nil && time.Since(began) > 170*time.Second {
		err = nil // what is left is the result
	}
	return endpoints, rows, err
}
