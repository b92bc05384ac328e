// SPDX-License-Identifier: Apache-2.0

package operator

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"

	v2 "github.com/lash-net/lash/api/v2"
)

// store is an API server of pods, CiliumEndpoints and CiliumIdentities.
type store struct {
	version    int
	pods       map[types.UID]*corev1.Pod
	endpoints  map[string]*v2.CiliumEndpoint
	identities map[string]*v2.CiliumIdentity
	fail       float64
}

var errStore = errors.New("no")

func (s *store) broken() bool { return rand.Float64() < s.fail }

func (s *store) identity(id int) {
	s.version++
	name := strconv.Itoa(id)
	s.identities[name] = &v2.CiliumIdentity{ObjectMeta: metav1.ObjectMeta{Name: name, UID: types.UID(fmt.Sprint("id-", s.version)), ResourceVersion: strconv.Itoa(s.version)}}
}

func (s *store) endpoint(name, pod string, id int64) {
	s.endpoints[name] = &v2.CiliumEndpoint{
		ObjectMeta: metav1.ObjectMeta{Name: name, Namespace: "d", UID: types.UID("cep-" + name + pod), OwnerReferences: []metav1.OwnerReference{{Kind: "Pod", UID: types.UID(pod)}}},
		Status:     v2.EndpointStatus{Identity: &v2.EndpointIdentity{ID: id}},
	}
}

func (s *store) EachEndpoint(_ context.Context, f func(*v2.CiliumEndpoint)) error {
	for _, e := range s.endpoints {
		f(e.DeepCopy())
	}
	if s.broken() {
		return errStore // after a part of the list
	}
	return nil
}

func (s *store) EachIdentity(_ context.Context, f func(*v2.CiliumIdentity)) error {
	for _, i := range s.identities {
		f(i.DeepCopy())
	}
	if s.broken() {
		return errStore
	}
	return nil
}

func (s *store) EachPod(_ context.Context, f func(*corev1.Pod)) error {
	if s.broken() {
		return errStore
	}
	for _, p := range s.pods {
		f(p)
	}
	return nil
}

func (s *store) DeleteEndpoint(_ context.Context, _, name string, uid types.UID) error {
	if s.broken() {
		return errStore
	}
	if e := s.endpoints[name]; e == nil || e.UID != uid {
		return apierrors.NewConflict(schema.GroupResource{}, name, errStore)
	}
	delete(s.endpoints, name)
	return nil
}

func (s *store) DeleteIdentity(_ context.Context, name string, uid types.UID, version string) error {
	if s.broken() {
		return errStore
	}
	if i := s.identities[name]; i == nil || i.UID != uid || i.ResourceVersion != version {
		return apierrors.NewConflict(schema.GroupResource{}, name, errStore)
	}
	delete(s.identities, name)
	return nil
}

func (s *store) MarkIdentity(_ context.Context, name, version string, since time.Time) error {
	if s.broken() {
		return errStore
	}
	i := s.identities[name]
	if i == nil || i.ResourceVersion != version {
		return apierrors.NewConflict(schema.GroupResource{}, name, errStore)
	}
	s.version++
	i.ResourceVersion = strconv.Itoa(s.version)
	if i.Annotations = map[string]string{}; !since.IsZero() {
		i.Annotations[v2.UnusedAnnotation] = since.UTC().Format(time.RFC3339Nano)
	}
	return nil
}

func (s *store) names() string {
	var out []string
	for _, name := range slices.Sorted(maps.Keys(s.identities)) {
		if s.identities[name].Annotations[v2.UnusedAnnotation] != "" {
			name += "?"
		}
		out = append(out, name)
	}
	return strings.Join(out, " ")
}

func newGC() (*store, *gcPass, *time.Time) {
	s := &store{pods: map[types.UID]*corev1.Pod{}, endpoints: map[string]*v2.CiliumEndpoint{}, identities: map[string]*v2.CiliumIdentity{}}
	now := time.Unix(1000, 0)
	return s, &gcPass{log: slog.New(slog.DiscardHandler), api: s, unused: 30 * time.Minute, grace: 15 * time.Minute, endpoints: 5 * time.Minute,
		now: func() time.Time { return now }, since: map[types.UID]time.Time{}}, &now
}

func TestIdentitiesAreMarkedBeforeTheyGo(t *testing.T) {
	s, p, now := newGC()
	p.endpoints = 0
	s.identity(300)
	s.identity(301)
	s.endpoint("a", "pod-a", 300)
	step := func(after time.Duration, want string) {
		t.Helper()
		*now = now.Add(after)
		if _, err := p.run(t.Context()); err != nil {
			t.Fatal(err)
		}
		if got := s.names(); got != want {
			t.Errorf("got %q, want %q", got, want)
		}
	}
	step(0, "300 301")
	step(29*time.Minute, "300 301")
	step(time.Minute, "300 301?")
	step(14*time.Minute, "300 301?")
	// An agent needs it after all: it takes the mark, and the time begins anew.
	s.MarkIdentity(t.Context(), "301", s.identities["301"].ResourceVersion, time.Time{})
	step(time.Minute, "300 301")
	step(31*time.Minute, "300 301?")
	// A pod has it: the mark goes, whoever forgot it.
	s.endpoint("b", "pod-b", 301)
	step(16*time.Minute, "300 301")
	delete(s.endpoints, "b")
	delete(s.endpoints, "a")
	step(0, "300 301")
	step(30*time.Minute, "300? 301?")
	s.identities["300"].Annotations[v2.UnusedAnnotation] = "yesterday" // nobody can read that
	step(time.Minute, "300? 301?")
	step(14*time.Minute, "300?")
	step(time.Minute, "")
}

// The agent was faster than the deletion: the object has changed since it was read.
func TestAnIdentityTakenMeanwhileIsNotDeleted(t *testing.T) {
	s, p, now := newGC()
	s.identity(300)
	p.run(t.Context())
	*now = now.Add(time.Hour)
	p.run(t.Context())
	*now = now.Add(time.Hour)
	racing := &racingStore{store: s}
	p.api = racing
	if _, err := p.run(t.Context()); err != nil || s.names() != "300" || !racing.raced {
		t.Errorf("%q, %v", s.names(), err)
	}
}

type racingStore struct {
	*store
	raced bool
}

func (r *racingStore) DeleteIdentity(ctx context.Context, name string, uid types.UID, version string) error {
	r.raced = true
	r.MarkIdentity(ctx, name, version, time.Time{})
	return r.store.DeleteIdentity(ctx, name, uid, version)
}

func TestEndpointsWithoutAPodAreRemoved(t *testing.T) {
	s, p, now := newGC()
	s.pods["pod-a"] = &corev1.Pod{ObjectMeta: metav1.ObjectMeta{UID: "pod-a"}}
	s.pods["pod-done"] = &corev1.Pod{ObjectMeta: metav1.ObjectMeta{UID: "pod-done"}, Status: corev1.PodStatus{Phase: corev1.PodSucceeded}}
	for _, name := range []string{"a", "done", "gone", "of-before"} {
		s.endpoint(name, "pod-"+name, 300)
	}
	s.endpoints["nobodys"] = &v2.CiliumEndpoint{ObjectMeta: metav1.ObjectMeta{Name: "nobodys", Namespace: "d"}}
	p.endpointAt = now.Add(time.Minute)
	p.run(t.Context())
	if len(s.endpoints) != 5 {
		t.Error("too early")
	}
	*now = now.Add(time.Minute)
	if _, err := p.run(t.Context()); err != nil || len(s.endpoints) != 1 || s.endpoints["a"] == nil {
		t.Errorf("%v: %v", err, slices.Collect(maps.Keys(s.endpoints)))
	}
}

// Whatever fails, nothing in use goes, and what is unused goes in the end.
func TestCollectionWithAFailingAPIServer(t *testing.T) {
	s, p, now := newGC()
	s.fail = .3
	inUse := func() {
		for _, e := range s.endpoints {
			if s.pods[e.OwnerReferences[0].UID] != nil && s.identities[strconv.FormatInt(e.Status.Identity.ID, 10)] == nil {
				t.Fatalf("identity %d is gone and has a pod", e.Status.Identity.ID)
			}
		}
	}
	for i := range 3000 {
		name := fmt.Sprint(rand.N(30))
		pod := types.UID("pod-" + name)
		switch rand.N(3) {
		case 0: // an agent takes an identity for a pod, as agents do
			id := 300 + rand.N(20)
			if have := s.identities[strconv.Itoa(id)]; have == nil {
				s.identity(id)
			} else if have.Annotations[v2.UnusedAnnotation] != "" {
				s.version++
				have.ResourceVersion, have.Annotations = strconv.Itoa(s.version), nil
			}
			s.pods[pod] = &corev1.Pod{ObjectMeta: metav1.ObjectMeta{UID: pod}}
			s.endpoint(name, string(pod), int64(id))
		case 1:
			delete(s.pods, pod)
		}
		*now = now.Add(rand.N(5 * time.Minute))
		p.run(t.Context())
		inUse()
		if i > 2500 {
			clear(s.pods)
		}
	}
	s.fail = 0
	clear(s.pods)
	for range 10 {
		*now = now.Add(20 * time.Minute)
		if _, err := p.run(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	if len(s.identities) != 0 || len(s.endpoints) != 0 {
		t.Errorf("left: %s, %d endpoints", s.names(), len(s.endpoints))
	}
}

func TestPassesAreAsFrequentAsPromised(t *testing.T) {
	for want, c := range map[time.Duration][3]time.Duration{ // unused, grace, endpoints
		5 * time.Minute:  {30 * time.Minute, 15 * time.Minute, 5 * time.Minute},
		7 * time.Minute:  {30 * time.Minute, 14 * time.Minute, 0},
		5 * time.Second:  {30 * time.Minute, 10 * time.Second, 5 * time.Minute},
		20 * time.Minute: {0, 10 * time.Second, 20 * time.Minute},
		time.Hour:        {0, 10 * time.Second, 0},
	} {
		if got := (&gcPass{unused: c[0], grace: c[1], endpoints: c[2]}).interval(); got != want {
			t.Errorf("%v: got %s, want %s", c, got, want)
		}
	}
}
