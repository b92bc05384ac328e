// SPDX-License-Identifier: Apache-2.0

package identity

import (
	"strings"
	"sync"

	"github.com/cilium/statedb"

	"github.com/lash-net/lash/internal/model"
	"github.com/lash-net/lash/internal/reconcile"
	"github.com/lash-net/lash/internal/state"
)

// Config is what identities depend on besides tables.
type Config struct {
	Cluster string // name, the label io.cilium.k8s.policy.cluster
	Filter  *model.LabelFilter
}

// Stage keeps pod-identities: one row a pod of this node that has, or will have, a network of its own.
func Stage(t *state.Tables, cfg Config) *state.KeyedStage[string, state.PodIdentity] {
	l := labeler{cfg: cfg}
	s := &state.KeyedStage[string, state.PodIdentity]{
		Name: "pod-identities",
		Out:  t.PodIdentities,
		Rows: state.Keyed[string, state.PodIdentity]{
			Sources: []state.Source[string]{
				state.Touches(t.DB, t.Pods, func(r state.Pod) []string { return []string{r.Key()} }),
				state.TouchesBy(t.DB, t.Identities, func(r state.Identity) []model.Labels { return []model.Labels{r.Labels} },
					func(txn statedb.ReadTxn, l model.Labels, touched map[string]struct{}) {
						for r := range t.PodIdentities.List(txn, state.PodIdentitiesByLabels(l)) {
							touched[r.Key()] = struct{}{}
						}
					}),
				state.Resets[string](t.Namespaces),
			},
			Prepare: func(now statedb.ReadTxn) func(statedb.ReadTxn, string) (state.PodIdentity, bool) {
				namespaces := map[string]state.Namespace{}
				for ns := range t.Namespaces.All(now) {
					namespaces[ns.Name] = ns
				}
				return func(txn statedb.ReadTxn, key string) (row state.PodIdentity, ok bool) {
					pod, _, ok := t.Pods.Get(txn, state.PodByName(key))
					ns, known := namespaces[pod.Namespace]
					if !ok || !known || pod.HostNetwork || pod.Ended() { // a namespace that is not known yet will be
						return row, false
					}
					row = state.PodIdentity{Namespace: pod.Namespace, Name: pod.Name, UID: pod.UID, Mirror: pod.Mirror, Labels: l.labels(pod, ns)}
					if id, ok := t.IdentityOf(txn, row.Labels); ok {
						row.Identity = id.ID
					}
					return row, true
				}
			},
		},
		ByKey: state.PodIdentityByName,
		Equal: reconcile.Comparable[state.PodIdentity],
	}
	return s.Register(t.DB)
}

// labeler remembers what the filter said of a key: the same few keys come with every pod.
type labeler struct {
	cfg  Config
	mu   sync.Mutex
	keep map[string]bool
}

const rememberedKeys = 4096

// labels are those of a pod that make its identity.
func (l *labeler) labels(pod state.Pod, ns state.Namespace) model.Labels {
	l.mu.Lock()
	defer l.mu.Unlock()
	m := make(map[string]string, len(pod.Labels)+4)
	add := func(key, value string) {
		if l.keeps(key) {
			m[model.LabelSource+key] = value
		}
	}
	for k, v := range pod.Labels {
		// What says something of the namespace, the cluster or the account is not the pod's to say.
		if !strings.HasPrefix(k, "io.cilium.k8s.") && k != model.LabelNamespace {
			add(k, v)
		}
	}
	for k, v := range ns.Labels {
		add(model.LabelNamespaceMeta+k, v)
	}
	add(model.LabelNamespace, pod.Namespace)
	add(model.LabelCluster, l.cfg.Cluster)
	if pod.ServiceAccount != "" {
		add(model.LabelServiceAccount, pod.ServiceAccount)
	}
	return model.LabelsOf(m)
}

func (l *labeler) keeps(key string) bool {
	keep, known := l.keep[key]
	if !known {
		if len(l.keep) >= rememberedKeys || l.keep == nil {
			l.keep = map[string]bool{}
		}
		keep = l.cfg.Filter.Keep(model.LabelSource, key)
		l.keep[key] = keep
	}
	return keep
}
