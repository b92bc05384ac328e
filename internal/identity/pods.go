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
func Stage(t *state.Tables, cfg Config) *state.Stage[state.PodIdentity] {
	l := labeler{cfg: cfg}
	s := &state.Stage[state.PodIdentity]{
		Name:   "pod-identities",
		Out:    t.PodIdentities,
		Inputs: []state.Input{state.From(t.Pods), state.From(t.Namespaces), state.From(t.Identities)},
		Compute: func(txn statedb.ReadTxn, _ bool) []state.PodIdentity {
			namespaces := map[string]state.Namespace{}
			for ns := range t.Namespaces.All(txn) {
				namespaces[ns.Name] = ns
			}
			rows := make([]state.PodIdentity, 0, t.Pods.NumObjects(txn))
			for pod := range t.Pods.All(txn) {
				ns, ok := namespaces[pod.Namespace]
				if !ok || pod.HostNetwork || pod.Ended() { // a namespace that is not known yet will be
					continue
				}
				row := state.PodIdentity{Namespace: pod.Namespace, Name: pod.Name, UID: pod.UID, Mirror: pod.Mirror, Labels: l.labels(pod, ns)}
				if id, ok := t.IdentityOf(txn, row.Labels); ok {
					row.Identity = id.ID
				}
				rows = append(rows, row)
			}
			return rows
		},
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
