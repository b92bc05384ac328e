// SPDX-License-Identifier: Apache-2.0

package k8s

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/cilium/statedb"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"

	v2 "github.com/lash-net/lash/api/v2"
	"github.com/lash-net/lash/internal/model"
	"github.com/lash-net/lash/internal/reconcile"
	"github.com/lash-net/lash/internal/state"
)

const (
	listTimeout = 60 * time.Second
	retryMin    = 200 * time.Millisecond
	retryMax    = 5 * time.Second // an API server that is back is used within this time
)

// ofServices selects services, and slices of services, that are for the proxy of this name to serve, or, if it is empty, that
// name none; headless ones need none.
func ofServices(proxy string) string {
	const name, headless = "service.kubernetes.io/service-proxy-name", ",!service.kubernetes.io/headless"
	if proxy != "" {
		return name + "=" + proxy + headless
	}
	return "!" + name + headless
}

// Reflector keeps rows equal to the API server's objects of one kind.
type Reflector struct {
	Name string // "core/v1::Service", as status shows it
	run  func(ctx context.Context) error
}

// Run lists and watches until ctx ends.
func (r *Reflector) Run(ctx context.Context) error { return r.run(ctx) }

// Reflectors prepares the reflectors of all kinds the agent needs; node is this node's name, proxy that of the services it
// serves (k8s-service-proxy-name). Their tables are complete
// after each one's first list.
func Reflectors(c *Client, t *state.Tables, node, proxy string, log *slog.Logger) []*Reflector {
	return []*Reflector{
		newReflector(t, log, spec[corev1.Node, state.NodeObject]{
			name: "core/v1::Node", kind: "Node", table: t.NodeObjects, convert: nodeConverter(node), equal: state.NodeObject.Equal,
			mine: func(r state.NodeObject) bool { return r.Source == model.SourceKubernetes },
			lw:   listWatch[corev1.NodeList](c, c.core, "nodes", nil, ""),
		}),
		newReflector(t, log, spec[v2.CiliumNode, state.NodeObject]{
			name: "cilium/v2::CiliumNode", kind: "CiliumNode", table: t.NodeObjects, convert: convertCiliumNode, equal: state.NodeObject.Equal,
			mine: func(r state.NodeObject) bool { return r.Source == model.SourceCustomResource },
			lw:   ciliumListWatch(c.cilium.Nodes),
		}),
		newReflector(t, log, spec[v2.CiliumIdentity, state.Identity]{
			name: "cilium/v2::CiliumIdentity", kind: "CiliumIdentity", table: t.Identities, convert: convertIdentity, equal: reconcile.Comparable[state.Identity],
			lw: ciliumListWatch(c.cilium.Identities),
		}),
		newReflector(t, log, spec[v2.CiliumEndpoint, state.CiliumEndpoint]{
			name: "cilium/v2::CiliumEndpoint", kind: "CiliumEndpoint", table: t.CiliumEndpoints, convert: convertEndpoint, equal: reconcile.Comparable[state.CiliumEndpoint],
			lw: ciliumListWatch(c.cilium.Endpoints),
		}),
		newReflector(t, log, spec[corev1.Namespace, state.Namespace]{
			name: "core/v1::Namespace", kind: "Namespace", table: t.Namespaces, convert: convertNamespace, equal: state.Namespace.Equal,
			lw: listWatch[corev1.NamespaceList](c, c.core, "namespaces", nil, ""),
		}),
		newReflector(t, log, spec[corev1.Service, state.Service]{
			name: "core/v1::Service", kind: "Service", table: t.Services, convert: convertService, equal: state.Service.Equal,
			lw: listWatch[corev1.ServiceList](c, c.core, "services", nil, ofServices(proxy)),
		}),
		newReflector(t, log, spec[discoveryv1.EndpointSlice, state.EndpointSlice]{
			name: "discovery/v1::EndpointSlice", kind: "EndpointSlice", table: t.Slices, convert: convertSlice, equal: state.EndpointSlice.Equal,
			lw: listWatch[discoveryv1.EndpointSliceList](c, c.discovery, "endpointslices", nil, ofServices(proxy)+",kubernetes.io/service-name"),
		}),
		newReflector(t, log, spec[corev1.Pod, state.Pod]{
			name: "core/v1::Pods", kind: "Pod", table: t.Pods, convert: convertPod, equal: state.Pod.Equal,
			lw: listWatch[corev1.PodList](c, c.core, "pods", fields.OneTermEqualSelector("spec.nodeName", node), ""),
		}),
	}
}

// spec describes one kind: Obj is the API's struct, Row the table's.
type spec[Obj, Row any] struct {
	name, kind string
	table      statedb.RWTable[Row]
	lw         *cache.ListWatch
	convert    func(*Obj) (Row, problems)
	equal      func(a, b Row) bool
	mine       func(Row) bool // rows of the table that are this kind's; nil: all
}

func listWatch[List any, P interface {
	*List
	runtime.Object
}](c *Client, r rest.Interface, resource string, field fields.Selector, labels string) *cache.ListWatch {
	tweak := func(o *metav1.ListOptions) {
		if field != nil {
			o.FieldSelector = field.String()
		}
		o.LabelSelector = labels
	}
	return &cache.ListWatch{
		ListWithContextFunc: func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) {
			ctx, cancel := context.WithTimeout(ctx, listTimeout)
			defer cancel()
			tweak(&o)
			out := P(new(List))
			return out, r.Get().Resource(resource).VersionedParams(&o, c.params).MaxRetries(0).Do(ctx).Into(out)
		},
		WatchFuncWithContext: func(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) {
			tweak(&o)
			o.Watch = true
			return plain(r.Get().Resource(resource).VersionedParams(&o, c.params).MaxRetries(0).Watch(ctx))
		},
	}
}

// ciliumListWatch lists and watches a kind of the group cilium.io.
func ciliumListWatch[Obj, List any, P interface {
	*Obj
	runtime.Object
	metav1.Object
}, L interface {
	*List
	runtime.Object
}](r *v2.Resource[Obj, List, P, L]) *cache.ListWatch {
	return &cache.ListWatch{
		ListWithContextFunc: func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) {
			ctx, cancel := context.WithTimeout(ctx, listTimeout)
			defer cancel()
			list, err := r.List(ctx, o)
			return L(list), err
		},
		WatchFuncWithContext: func(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) {
			return plain(r.Watch(ctx, o))
		},
	}
}

// Requests are not retried by the client, which does so silently for ten seconds; the loop of the reflector does, and reports.

// plain hides "connection refused" from the reflector, which would otherwise wait for up to a minute on its own before
// it tries again.
func plain(w watch.Interface, err error) (watch.Interface, error) {
	if err != nil {
		return nil, errors.New(err.Error())
	}
	return w, nil
}

func newReflector[Obj, Row any](t *state.Tables, log *slog.Logger, s spec[Obj, Row]) *Reflector {
	st := &store[Obj, Row]{spec: s, tables: t, log: log}
	if st.mine == nil {
		st.mine = state.All[Row]
	}
	w := t.DB.WriteTxn(s.table)
	st.done = s.table.RegisterInitializer(w, s.name)
	w.Commit()
	return &Reflector{Name: s.name, run: func(ctx context.Context) error {
		r := cache.NewReflectorWithOptions(s.lw, any(new(Obj)), st, cache.ReflectorOptions{Name: s.name})
		health := reconcile.Health{Name: "k8s-reflector " + s.name}
		st.synced = func() {
			if health.Errors > 0 {
				log.Info("API server answers again", "kind", s.name)
			}
			health.Errors, health.Message, health.LastSuccess = 0, "", time.Now()
			t.Report(health)
		}
		delay := retryMin
		for ctx.Err() == nil {
			started := time.Now()
			err := r.ListAndWatchWithContext(ctx)
			if ctx.Err() != nil {
				return nil
			}
			if time.Since(started) > 10*time.Second {
				delay = retryMin
			}
			if err != nil {
				if health.Errors == 0 {
					log.Warn("API server does not answer, rows stay as they are", "kind", s.name, "error", err)
				}
				health.Errors++
				health.Message, health.LastError = err.Error(), time.Now()
				t.Report(health)
			}
			select {
			case <-ctx.Done():
			case <-time.After(delay):
			}
			delay = min(2*delay, retryMax)
		}
		return nil
	}}
}

// store is the reflector's store; its methods are called by one goroutine.
type store[Obj, Row any] struct {
	spec[Obj, Row]
	tables *state.Tables
	log    *slog.Logger
	done   func(statedb.WriteTxn)
	synced func()
}

var _ cache.ReflectorStore = (*store[corev1.Node, state.NodeObject])(nil)

// Add implements cache.ReflectorStore.
func (s *store[Obj, Row]) Add(obj any) error {
	o, err := s.object(obj)
	if err != nil {
		return err
	}
	row, p := s.convert(o)
	w := s.tables.DB.WriteTxn(s.table, s.tables.BadObjects)
	defer w.Abort()
	changed := s.judge(w, any(o).(metav1.Object), p)
	if old, _, ok := s.table.Get(w, s.table.PrimaryIndexer().QueryFromObject(row)); !ok || !s.equal(old, row) {
		if _, _, err := s.table.Insert(w, row); err != nil {
			return err
		}
		changed = true
	}
	if changed {
		w.Commit()
	}
	return nil
}

// Update implements cache.ReflectorStore.
func (s *store[Obj, Row]) Update(obj any) error { return s.Add(obj) }

// Delete implements cache.ReflectorStore.
func (s *store[Obj, Row]) Delete(obj any) error {
	if gone, ok := obj.(cache.DeletedFinalStateUnknown); ok {
		obj = gone.Obj
	}
	o, err := s.object(obj)
	if err != nil {
		return err
	}
	row, _ := s.convert(o)
	w := s.tables.DB.WriteTxn(s.table, s.tables.BadObjects)
	defer w.Abort()
	s.judge(w, any(o).(metav1.Object), nil)
	if _, _, err := s.table.Delete(w, row); err != nil {
		return err
	}
	w.Commit()
	return nil
}

// Replace implements cache.ReflectorStore: the list is complete, so rows that are not in it are gone.
func (s *store[Obj, Row]) Replace(list []any, _ string) error {
	rows := make([]Row, 0, len(list))
	w := s.tables.DB.WriteTxn(s.table, s.tables.BadObjects)
	defer w.Abort()
	named := map[string]struct{}{}
	for _, obj := range list {
		o, err := s.object(obj)
		if err != nil {
			return err
		}
		row, p := s.convert(o)
		meta := any(o).(metav1.Object)
		named[s.kind+" "+objectName(meta)] = struct{}{}
		s.judge(w, meta, p)
		rows = append(rows, row)
	}
	state.Replace(w, s.table, rows, s.equal, s.mine)
	for _, bad := range state.Rows(w, s.tables.BadObjects) {
		if _, ok := named[bad.Key()]; !ok && bad.Kind == s.kind {
			if _, _, err := s.tables.BadObjects.Delete(w, bad); err != nil {
				return err
			}
		}
	}
	if s.done != nil {
		s.done(w)
		s.done = nil
	}
	w.Commit()
	s.synced()
	return nil
}

// Resync implements cache.ReflectorStore.
func (s *store[Obj, Row]) Resync() error { return nil }

// judge keeps the row of bad-objects of one object right and logs a new problem once.
func (s *store[Obj, Row]) judge(w statedb.WriteTxn, o metav1.Object, p problems) (changed bool) {
	bad := state.BadObject{Kind: s.kind, Name: objectName(o), UID: string(o.GetUID())}
	old, _, had := s.tables.BadObjects.Get(w, state.BadObjectByKey(bad.Key()))
	if len(p) == 0 {
		if had {
			s.tables.BadObjects.Delete(w, old)
		}
		return had
	}
	bad.Field, bad.Problem = p[0], p[1]
	if more := len(p)/2 - 1; more > 0 {
		bad.Problem += fmt.Sprintf(" (and %d more)", more)
	}
	if had && old == bad {
		return false
	}
	s.log.Error("object has a value that cannot be used", "kind", s.kind, "name", bad.Name, "field", bad.Field, "problem", bad.Problem)
	s.tables.BadObjects.Insert(w, bad)
	return true
}

func (s *store[Obj, Row]) object(obj any) (*Obj, error) {
	o, ok := obj.(*Obj)
	if !ok {
		return nil, fmt.Errorf("%s: the API server sent a %T", s.name, obj)
	}
	return o, nil
}

func objectName(o metav1.Object) string {
	if o.GetNamespace() == "" {
		return o.GetName()
	}
	return o.GetNamespace() + "/" + o.GetName()
}
