// SPDX-License-Identifier: Apache-2.0

package model

import (
	"hash/fnv"
	"maps"
	"slices"
	"strings"
)

// Sources and keys of the labels that come from Kubernetes and are not a pod's own.
const (
	LabelSource         = "k8s:"
	LabelNamespace      = "io.kubernetes.pod.namespace"
	LabelNamespaceMeta  = "io.cilium.k8s.namespace.labels." // before each label of the namespace
	LabelCluster        = "io.cilium.k8s.policy.cluster"
	LabelServiceAccount = "io.cilium.k8s.policy.serviceaccount"
)

// Labels is a set of labels with their sources in its only spelling, "k8s:a=1;k8s:b=2" sorted by key: two sets are
// equal if the strings are. Neither keys nor values of Kubernetes contain a semicolon.
type Labels string

// LabelsOf is the set of a map from "source:key" to value.
func LabelsOf(m map[string]string) Labels {
	var b strings.Builder
	for i, k := range slices.Sorted(maps.Keys(m)) {
		if i > 0 {
			b.WriteByte(';')
		}
		b.WriteString(k)
		b.WriteByte('=')
		b.WriteString(m[k])
	}
	return Labels(b.String())
}

// List is "source:key=value" of each label, "source:key" where there is no value.
func (l Labels) List() []string {
	if l == "" {
		return nil
	}
	list := strings.Split(string(l), ";")
	for i, s := range list {
		list[i] = strings.TrimSuffix(s, "=")
	}
	return list
}

// Map is the inverse of LabelsOf.
func (l Labels) Map() map[string]string {
	m := map[string]string{}
	for part := range strings.SplitSeq(string(l), ";") {
		if k, v, ok := strings.Cut(part, "="); ok {
			m[k] = v
		}
	}
	return m
}

// Number is where the search for the labels' identity begins: a hash, so that nodes that know nothing of each other
// begin at the same number.
func (l Labels) Number() Identity {
	h := fnv.New64a()
	h.Write([]byte(l))
	return IdentityMin + Identity(h.Sum64()%uint64(IdentityMax-IdentityMin+1))
}

// Next is the number after id among those that are allocated; the first comes after the last.
func (id Identity) Next() Identity {
	if id < IdentityMin || id >= IdentityMax {
		return IdentityMin
	}
	return id + 1
}
