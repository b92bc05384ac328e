// SPDX-License-Identifier: Apache-2.0

package operator

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	apiextensionsclient "k8s.io/apiextensions-apiserver/pkg/client/clientset/clientset/typed/apiextensions/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/tools/leaderelection"
	"k8s.io/client-go/tools/leaderelection/resourcelock"

	v2 "github.com/lash-net/lash/api/v2"
	"github.com/lash-net/lash/internal/config"
)

// LeaseName is the Lease whose holder writes.
const LeaseName = "lash-operator-resource-lock"

const (
	minBackoff = 200 * time.Millisecond
	maxBackoff = 30 * time.Second
	stuckAfter = 2 * time.Minute // a pass that takes longer makes the replica unhealthy
)

// Operator is one replica.
type Operator struct {
	config     *config.Config
	log        *slog.Logger
	rest       *rest.Config
	namespace  string       // of the lease
	identity   string       // of this replica in the lease
	nodesBegan atomic.Int64 // pass over nodes: unix nanoseconds, 0 between passes
	gcBegan    atomic.Int64 // pass over what is unused
	isLeader   atomic.Bool
	leaseTimes leaseTimes
}

// leaseTimes are leader election's: a dead leader is replaced within duration, a live one gives up after deadline.
type leaseTimes struct{ duration, deadline, retry time.Duration }

// New returns a replica that will talk to the API server of restConfig. identity must differ between replicas.
func New(c *config.Config, log *slog.Logger, restConfig *rest.Config, namespace, identity string) *Operator {
	r := rest.CopyConfig(restConfig)
	r.QPS, r.Burst = 50, 100
	r.Timeout = 10 * time.Second // less than a lease: a write that hangs cannot land after the lease has passed on
	return &Operator{config: c, log: log, rest: r, namespace: namespace, identity: identity,
		leaseTimes: leaseTimes{15 * time.Second, 10 * time.Second, 2 * time.Second}}
}

// Run serves health and works whenever this replica leads. It returns nil when ctx is done, an error when the lease was
// lost or health cannot be served: the process should then end, and be started anew.
func (o *Operator) Run(ctx context.Context) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	go func() {
		if err := o.serveHealth(ctx); err != nil {
			cancel(err)
		}
	}()
	clientset, err := kubernetes.NewForConfig(o.rest)
	if err != nil {
		return err
	}
	// The elector has a context of its own: the lease is released only after work has stopped.
	electorCtx, releaseLease := context.WithCancel(context.WithoutCancel(ctx))
	defer releaseLease()
	var worked atomic.Bool
	elector, err := leaderelection.NewLeaderElector(leaderelection.LeaderElectionConfig{
		Lock: &resourcelock.LeaseLock{
			LeaseMeta:  metav1.ObjectMeta{Namespace: o.namespace, Name: LeaseName},
			Client:     clientset.CoordinationV1(),
			LockConfig: resourcelock.ResourceLockConfig{Identity: o.identity},
		},
		LeaseDuration: o.leaseTimes.duration, RenewDeadline: o.leaseTimes.deadline, RetryPeriod: o.leaseTimes.retry,
		ReleaseOnCancel: true,
		Callbacks: leaderelection.LeaderCallbacks{
			OnStartedLeading: func(leading context.Context) {
				worked.Store(true)
				o.isLeader.Store(true)
				o.log.Info("leading", "identity", o.identity)
				ctx, stop := context.WithCancel(ctx)
				defer stop()
				context.AfterFunc(leading, stop)
				err := o.lead(ctx, clientset)
				o.isLeader.Store(false)
				cancel(err)
				releaseLease()
			},
			OnStoppedLeading: func() {
				if ctx.Err() == nil {
					cancel(errors.New("lease lost"))
				}
			},
			OnNewLeader: func(id string) {
				if id != o.identity {
					o.log.Info("standing by", "leader", id)
				}
			},
		},
	})
	if err != nil {
		return err
	}
	context.AfterFunc(ctx, func() {
		if !worked.Load() {
			releaseLease()
		}
	})
	elector.Run(electorCtx)
	<-ctx.Done()
	if cause := context.Cause(ctx); !errors.Is(cause, context.Canceled) {
		return cause
	}
	return nil
}

// Leads reports whether this replica holds the lease.
func (o *Operator) Leads() bool { return o.isLeader.Load() }

// lead works until ctx is done.
func (o *Operator) lead(ctx context.Context, clientset kubernetes.Interface) error {
	extensions, err := apiextensionsclient.NewForConfig(o.rest)
	if err != nil {
		return err
	}
	backoff := minBackoff
	for {
		err := installDefinitions(ctx, o.log, extensions.CustomResourceDefinitions())
		if err == nil {
			break
		}
		o.log.Warn("definitions not installed", "error", err)
		if !sleep(ctx, &backoff) {
			return nil
		}
	}

	watchConfig := rest.CopyConfig(o.rest)
	watchConfig.Timeout = 0 // a watch lasts
	watchClientset, err := kubernetes.NewForConfig(watchConfig)
	if err != nil {
		return err
	}
	watchCilium, err := v2.New(watchConfig)
	if err != nil {
		return err
	}
	cilium, err := v2.New(o.rest)
	if err != nil {
		return err
	}
	c := newCaches(watchClientset, watchCilium.Nodes, clientset)
	if err := c.start(ctx); err != nil {
		return err
	}
	var gc sync.WaitGroup
	defer gc.Wait()
	// Collection has a rate of its own: thousands of identities go at once when a big deployment is relabelled.
	gcConfig := rest.CopyConfig(o.rest)
	gcConfig.QPS, gcConfig.Burst = 200, 400
	gcCilium, err := v2.New(gcConfig)
	if err != nil {
		return err
	}
	gc.Go(func() { o.loop(ctx, newGCPass(o.log, o.config, apiObjects{gcCilium, clientset}), nil, &o.gcBegan) })
	gc.Go(func() {
		if err := reportProblems(ctx, o.config, o.log, watchConfig); err != nil {
			o.log.Error("problems of services are not reported on them", "error", err)
		}
	})
	o.loop(ctx, newNodesPass(o.log, o.config, c, cilium.Nodes), c.changed, &o.nodesBegan)
	return nil
}

// pass brings something to where it should be. It returns how long until the next is due though nothing changes (0:
// never), and what failed.
type pass interface {
	run(ctx context.Context) (again time.Duration, err error)
}

// loop runs a pass after every change, when a pass asked for another, and with backoff after a failure, until ctx is
// done.
func (o *Operator) loop(ctx context.Context, p pass, changed <-chan struct{}, began *atomic.Int64) {
	backoff := minBackoff
	for {
		began.Store(time.Now().UnixNano())
		again, err := p.run(ctx)
		began.Store(0)
		if ctx.Err() != nil {
			return
		}
		if err != nil {
			o.log.Warn("pass incomplete", "error", err)
			if !sleep(ctx, &backoff) {
				return
			}
			continue
		}
		backoff = minBackoff
		var timer <-chan time.Time
		if again > 0 {
			timer = time.After(again)
		}
		select {
		case <-ctx.Done():
			return
		case <-changed:
		case <-timer:
		}
	}
}

// sleep waits for the backoff and doubles it; false when ctx is done.
func sleep(ctx context.Context, backoff *time.Duration) bool {
	select {
	case <-ctx.Done():
		return false
	case <-time.After(*backoff):
		*backoff = min(2**backoff, maxBackoff)
		return true
	}
}

// serveHealth answers /healthz until ctx is done. Replicas on one node share the address: the one that comes second
// waits for it, and until then the first answers for the node.
func (o *Operator) serveHealth(ctx context.Context) error {
	var l net.Listener
	for said := false; ; said = true {
		var err error
		if l, err = (&net.ListenConfig{}).Listen(ctx, "tcp", o.config.OperatorAPIServeAddr); err == nil {
			break
		}
		if ctx.Err() != nil {
			return nil
		}
		if !errors.Is(err, syscall.EADDRINUSE) {
			return fmt.Errorf("serve health (operator-api-serve-addr): %w", err)
		}
		if !said {
			o.log.Warn("health is answered by another process", "address", o.config.OperatorAPIServeAddr)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(time.Second):
		}
	}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) {
		for _, pass := range []*atomic.Int64{&o.nodesBegan, &o.gcBegan} {
			if began := pass.Load(); began != 0 && time.Since(time.Unix(0, began)) > stuckAfter {
				http.Error(w, "a pass has been running for more than "+stuckAfter.String(), http.StatusServiceUnavailable)
				return
			}
		}
		if o.Leads() {
			fmt.Fprintln(w, "ok, leading")
			return
		}
		fmt.Fprintln(w, "ok, standing by")
	})
	srv := &http.Server{Handler: mux, ReadHeaderTimeout: 5 * time.Second}
	defer context.AfterFunc(ctx, func() { srv.Close() })()
	if err := srv.Serve(l); !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("serve health: %w", err)
	}
	return nil
}

// caches mirror what the passes read, by list and watch.
type caches struct {
	nodes, ciliumNodes, serviceCIDRs cache.SharedIndexInformer
	clientset                        kubernetes.Interface
	changed                          chan struct{}
}

func newCaches(watchClientset kubernetes.Interface, nodes *v2.Nodes, clientset kubernetes.Interface) *caches {
	c := &caches{clientset: clientset, changed: make(chan struct{}, 1)}
	c.nodes = cache.NewSharedIndexInformer(&cache.ListWatch{
		ListWithContextFunc: func(ctx context.Context, opts metav1.ListOptions) (runtime.Object, error) {
			return watchClientset.CoreV1().Nodes().List(ctx, opts)
		},
		WatchFuncWithContext: func(ctx context.Context, opts metav1.ListOptions) (watch.Interface, error) {
			return watchClientset.CoreV1().Nodes().Watch(ctx, opts)
		},
	}, &corev1.Node{}, 0, nil)
	c.ciliumNodes = cache.NewSharedIndexInformer(&cache.ListWatch{
		ListWithContextFunc: func(ctx context.Context, opts metav1.ListOptions) (runtime.Object, error) {
			return nodes.List(ctx, opts)
		},
		WatchFuncWithContext: nodes.Watch,
	}, &v2.CiliumNode{}, 0, nil)
	c.serviceCIDRs = cache.NewSharedIndexInformer(&cache.ListWatch{
		ListWithContextFunc: func(ctx context.Context, opts metav1.ListOptions) (runtime.Object, error) {
			l, err := watchClientset.NetworkingV1().ServiceCIDRs().List(ctx, opts)
			if apierrors.IsNotFound(err) { // Kubernetes before 1.33 does not say
				return &networkingv1.ServiceCIDRList{ListMeta: metav1.ListMeta{ResourceVersion: "0"}}, nil
			}
			return l, err
		},
		WatchFuncWithContext: func(ctx context.Context, opts metav1.ListOptions) (watch.Interface, error) {
			w, err := watchClientset.NetworkingV1().ServiceCIDRs().Watch(ctx, opts)
			if apierrors.IsNotFound(err) {
				return watch.NewFake(), nil
			}
			return w, err
		},
	}, &networkingv1.ServiceCIDR{}, 0, nil)
	return c
}

// start returns when the caches are complete, or with an error when ctx is done.
func (c *caches) start(ctx context.Context) error {
	var synced []cache.InformerSynced
	for _, inf := range []cache.SharedIndexInformer{c.nodes, c.ciliumNodes, c.serviceCIDRs} {
		if err := inf.SetTransform(strip); err != nil {
			return err
		}
		if _, err := inf.AddEventHandler(cache.ResourceEventHandlerFuncs{
			AddFunc:    func(any) { c.notify() },
			UpdateFunc: func(any, any) { c.notify() },
			DeleteFunc: func(any) { c.notify() },
		}); err != nil {
			return err
		}
		go inf.RunWithContext(ctx)
		synced = append(synced, inf.HasSynced)
	}
	if !cache.WaitForCacheSync(ctx.Done(), synced...) {
		return ctx.Err()
	}
	return nil
}

// notify coalesces: one pass sees any number of changes.
func (c *caches) notify() {
	select {
	case c.changed <- struct{}{}:
	default:
	}
}

// strip drops what no pass reads, which is most of a Node.
func strip(obj any) (any, error) {
	switch o := obj.(type) {
	case *corev1.Node:
		return &corev1.Node{
			ObjectMeta: metav1.ObjectMeta{Name: o.Name, UID: o.UID, ResourceVersion: o.ResourceVersion},
			Status:     corev1.NodeStatus{Addresses: o.Status.Addresses},
		}, nil
	case *v2.CiliumNode:
		o.ManagedFields = nil
		o.Status.IPAM.Used = nil
	}
	return obj, nil
}

// Nodes implements view.
func (c *caches) Nodes() []*corev1.Node { return items[*corev1.Node](c.nodes) }

// CiliumNodes implements view.
func (c *caches) CiliumNodes() []*v2.CiliumNode { return items[*v2.CiliumNode](c.ciliumNodes) }

// ServiceCIDRs implements view.
func (c *caches) ServiceCIDRs() []netip.Prefix {
	var out []netip.Prefix
	for _, s := range items[*networkingv1.ServiceCIDR](c.serviceCIDRs) {
		for _, text := range s.Spec.CIDRs {
			if p, err := netip.ParsePrefix(text); err == nil {
				out = append(out, p.Masked())
			}
		}
	}
	return out
}

// NodeIsGone implements view by asking the API server.
func (c *caches) NodeIsGone(ctx context.Context, name string) (bool, error) {
	_, err := c.clientset.CoreV1().Nodes().Get(ctx, name, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return true, nil
	}
	return false, err
}

func items[T any](inf cache.SharedIndexInformer) []T {
	list := inf.GetStore().List()
	out := make([]T, 0, len(list))
	for _, obj := range list {
		out = append(out, obj.(T))
	}
	return out
}
