// SPDX-License-Identifier: Apache-2.0

package model

import (
	"fmt"
	"maps"
	"slices"
	"testing"
)

func TestLabelsHaveOneSpelling(t *testing.T) {
	m := map[string]string{"k8s:b": "2", "k8s:a": "", "k8s:a-b": "x", "k8s:app.kubernetes.io/name": "n"}
	l := LabelsOf(m)
	if want := Labels("k8s:a=;k8s:a-b=x;k8s:app.kubernetes.io/name=n;k8s:b=2"); l != want {
		t.Errorf("got %q, want %q", l, want)
	}
	if !maps.Equal(l.Map(), m) {
		t.Errorf("back: %v", l.Map())
	}
	if want := []string{"k8s:a", "k8s:a-b=x", "k8s:app.kubernetes.io/name=n", "k8s:b=2"}; !slices.Equal(l.List(), want) {
		t.Errorf("list: %q", l.List())
	}
	if Labels("").List() != nil || len(Labels("").Map()) != 0 {
		t.Error("no labels give some")
	}
}

func TestNumbersStayInTheirRange(t *testing.T) {
	seen := map[Identity]int{}
	for i := range 20000 {
		id := Labels(fmt.Sprintf("k8s:app=%d", i)).Number()
		if id < IdentityMin || id > IdentityMax {
			t.Fatalf("%d", id)
		}
		seen[id]++
	}
	if len(seen) < 17000 { // 17,200 of 65,280 are expected of a good hash
		t.Errorf("only %d different numbers", len(seen))
	}
	for in, want := range map[Identity]Identity{IdentityMax: IdentityMin, IdentityMin: IdentityMin + 1, 0: IdentityMin, 1 << 24: IdentityMin} {
		if got := in.Next(); got != want {
			t.Errorf("after %d comes %d, want %d", in, got, want)
		}
	}
}

// The number of a set of labels is the same in every version: agents of two versions work together.
func TestNumberOfLabelsIsFixed(t *testing.T) {
	for l, want := range map[Labels]Identity{"k8s:app=x;k8s:io.kubernetes.pod.namespace=default": 56836, "": 2853} {
		if got := l.Number(); got != want {
			t.Errorf("%q has %d, want %d", l, got, want)
		}
	}
}

func TestLabelFilter(t *testing.T) {
	for _, tc := range []struct {
		patterns, source, key string
		want                  bool
	}{
		{"", "k8s:", "app", true},
		{"", "k8s:", "app.kubernetes.io/name", true},
		{"", "k8s:", "kubernetes.io/hostname", false},
		{"", "k8s:", "beta.kubernetes.io/arch", false},
		{"", "k8s:", "io.kubernetes.pod.uid", false},
		{"", "k8s:", "io.kubernetes.pod.namespace", true},
		{"", "k8s:", "io.cilium.k8s.namespace.labels.kubernetes.io/metadata.name", true},
		{"", "k8s:", "io.cilium.k8s.policy.cluster", true},
		{"", "k8s:", "io.cilium.k8s.policy.serviceaccount", true},
		{"", "k8s:", "pod-template-hash", false},
		{"", "k8s:", "controller-revision-hash", false},
		{"", "k8s:", "statefulset.kubernetes.io/pod-name", false},
		{"", "k8s:", "apps.kubernetes.io/pod-index", false},
		{"", "k8s:", "batch.kubernetes.io/job-name", true},
		{"", "k8s:", "k8sXio", true}, // a point is a point
		{"", "k8s:", "k8s-app", true},
		{"", "reserved:", "host", true},
		{"k8s:app", "k8s:", "app", true},
		{"k8s:app", "k8s:", "app-production", true}, // the beginning counts
		{"k8s:app", "k8s:", "env", false},
		{"k8s:app", "k8s:", "my-app", false},
		{"k8s:app", "k8s:", "app.kubernetes.io/part-of", true},
		{"k8s:app", "k8s:", "io.kubernetes.pod.namespace", true},
		{"k8s:app", "k8s:", "io.cilium.k8s.policy.cluster", true},
		{"k8s:app", "k8s:", "io.cilium.k8s.policy.serviceaccount", false},
		{"k8s:app", "reserved:", "host", true},
		{"k8s:!job-name !team", "k8s:", "job-name", false},
		{"k8s:!job-name !team", "k8s:", "team-a", false},
		{"k8s:!job-name !team", "k8s:", "env", true},
		{`any:pod-template-hash`, "k8s:", "pod-template-hash", true}, // of equally long matches the last
		{`app\.kubernetes\.io/instance !app\.kubernetes\.io`, "k8s:", "app.kubernetes.io/instance", true},
		{`app\.kubernetes\.io/instance !app\.kubernetes\.io`, "k8s:", "app.kubernetes.io/name", false},
		{"reserved:app", "k8s:", "app", false}, // of another source
		{`[a-c]{2,3}x|yy`, "k8s:", "abx", true},
	} {
		f, err := ParseLabelFilter(tc.patterns)
		if err != nil {
			t.Fatal(err)
		}
		if got := f.Keep(tc.source, tc.key); got != tc.want {
			t.Errorf("%q: %s%s is kept: %v", tc.patterns, tc.source, tc.key, got)
		}
	}
	for _, bad := range []string{"k8s:", "!", "k8s:!", "a(", "any:!["} {
		if _, err := ParseLabelFilter(bad); err == nil {
			t.Errorf("%q is accepted", bad)
		}
	}
}
