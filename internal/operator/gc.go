// SPDX-License-Identifier: Apache-2.0

package operator

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"strconv"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"

	v2 "github.com/lash-net/lash/api/v2"
	"github.com/lash-net/lash/internal/config"
)

// objects is what the pass over unused objects reads and writes; apiObjects is one. Each calls f for every object
// there was at one moment after the call; deletions are of the very object that was read.
type objects interface {
	EachEndpoint(ctx context.Context, f func(*v2.CiliumEndpoint)) error
	EachIdentity(ctx context.Context, f func(*v2.CiliumIdentity)) error
	EachPod(ctx context.Context, f func(*corev1.Pod)) error
	DeleteEndpoint(ctx context.Context, namespace, name string, uid types.UID) error
	DeleteIdentity(ctx context.Context, name string, uid types.UID, version string) error
	// MarkIdentity sets the annotation UnusedAnnotation to since, or removes it if since is zero, if the object has
	// not changed since version.
	MarkIdentity(ctx context.Context, name, version string, since time.Time) error
}

// gcPass deletes CiliumEndpoints whose pod is gone, and identities that no CiliumEndpoint has.
//
// An identity in use is never deleted. One without a CiliumEndpoint may have a user all the same: an agent that has just
// taken it for a pod that has no address yet. So it is first marked, and deleted only if the mark is still there after
// the time of grace and nothing else has changed: agents take the mark from what they need.
type gcPass struct {
	log        *slog.Logger
	api        objects
	unused     time.Duration // before an identity is marked; 0: never
	grace      time.Duration // from the mark to the deletion
	endpoints  time.Duration // between two looks for CiliumEndpoints without a pod; 0: never
	now        func() time.Time
	endpointAt time.Time               // of the next look
	since      map[types.UID]time.Time // when an identity was first seen without a user
}

func newGCPass(log *slog.Logger, c *config.Config, api objects) *gcPass {
	p := &gcPass{
		log: log, api: api, unused: c.IdentityHeartbeatTimeout, grace: c.IdentityGCInterval, endpoints: c.CiliumEndpointGCInterval,
		now: time.Now, since: map[types.UID]time.Time{},
	}
	p.endpointAt = p.now().Add(p.endpoints)
	return p
}

// run implements pass.
func (p *gcPass) run(ctx context.Context) (again time.Duration, err error) {
	used := map[string]bool{}
	var all []*v2.CiliumEndpoint
	look := p.endpoints > 0 && !p.now().Before(p.endpointAt)
	err = p.api.EachEndpoint(ctx, func(e *v2.CiliumEndpoint) {
		if id := e.Status.Identity; id != nil {
			used[strconv.FormatInt(id.ID, 10)] = true
		}
		if look {
			all = append(all, &v2.CiliumEndpoint{ObjectMeta: metav1.ObjectMeta{Namespace: e.Namespace, Name: e.Name, UID: e.UID, OwnerReferences: e.OwnerReferences}})
		}
	})
	if err != nil {
		return p.interval(), fmt.Errorf("list CiliumEndpoints: %w", err)
	}
	var errs []error
	if look {
		errs = append(errs, p.orphans(ctx, all))
		p.endpointAt = p.now().Add(p.endpoints)
	}
	if p.unused > 0 {
		errs = append(errs, p.identities(ctx, used))
	}
	return p.interval(), errors.Join(errs...)
}

// interval is as often as the durations ask for, no more: every pass lists a lot. A mark and the end of the time of grace
// are seen at most half of it late.
func (p *gcPass) interval() time.Duration {
	d := time.Hour // nothing is collected
	if p.endpoints > 0 {
		d = p.endpoints
	}
	if p.unused > 0 {
		d = min(d, p.unused/2, p.grace/2)
	}
	return max(d, 500*time.Millisecond)
}

// orphans deletes the CiliumEndpoints whose pod is gone or has ended. The pods are listed after them, so that a pod
// that is not among these is no more.
func (p *gcPass) orphans(ctx context.Context, endpoints []*v2.CiliumEndpoint) error {
	pods := map[types.UID]bool{}
	err := p.api.EachPod(ctx, func(pod *corev1.Pod) {
		if pod.Status.Phase != corev1.PodSucceeded && pod.Status.Phase != corev1.PodFailed {
			pods[pod.UID] = true
		}
	})
	if err != nil {
		return fmt.Errorf("list pods: %w", err)
	}
	var errs []error
	for _, e := range endpoints {
		alive := false
		for _, ref := range e.OwnerReferences {
			alive = alive || ref.Kind == "Pod" && pods[ref.UID]
		}
		if alive {
			continue
		}
		err := p.api.DeleteEndpoint(ctx, e.Namespace, e.Name, e.UID)
		if err != nil && !apierrors.IsNotFound(err) && !apierrors.IsConflict(err) {
			errs = append(errs, fmt.Errorf("delete CiliumEndpoint %s/%s: %w", e.Namespace, e.Name, err))
			continue
		}
		p.log.Info("endpoint without a pod removed", "endpoint", e.Namespace+"/"+e.Name)
	}
	return errors.Join(errs...)
}

// identities takes each identity one step further: unused, marked, gone; or back.
func (p *gcPass) identities(ctx context.Context, used map[string]bool) error {
	var all []*v2.CiliumIdentity
	if err := p.api.EachIdentity(ctx, func(i *v2.CiliumIdentity) {
		if _, marked := i.Annotations[v2.UnusedAnnotation]; marked || !used[i.Name] {
			all = append(all, i)
		}
	}); err != nil {
		return fmt.Errorf("list CiliumIdentities: %w", err)
	}
	var errs []error
	now, since := p.now(), map[types.UID]time.Time{}
	for _, i := range all {
		mark, marked := i.Annotations[v2.UnusedAnnotation]
		at, err := time.Parse(time.RFC3339, mark)
		first, known := p.since[i.UID]
		switch {
		case used[i.Name]:
			err = p.api.MarkIdentity(ctx, i.Name, i.ResourceVersion, time.Time{})
		case marked && err == nil:
			if err = nil; now.Sub(at) >= p.grace {
				if err = p.api.DeleteIdentity(ctx, i.Name, i.UID, i.ResourceVersion); err == nil {
					p.log.Info("identity removed", "identity", i.Name, "unusedSince", mark)
				}
			}
		case known && now.Sub(first) >= p.unused || marked: // a mark that nobody can read is replaced
			err = p.api.MarkIdentity(ctx, i.Name, i.ResourceVersion, now)
			since[i.UID] = first
		default:
			if err = nil; !known {
				first = now
			}
			since[i.UID] = first
		}
		// A conflict: somebody needs it, or has changed it; the next pass sees.
		if err != nil && !apierrors.IsNotFound(err) && !apierrors.IsConflict(err) {
			errs = append(errs, fmt.Errorf("CiliumIdentity %s: %w", i.Name, err))
		}
	}
	p.since = since
	return errors.Join(errs...)
}

// apiObjects are the API server's.
type apiObjects struct {
	cilium    *v2.Clients
	clientset kubernetes.Interface
}

// pages calls list for one page after the other. No resource version is given: pages are of one moment, and that is
// after the call.
func pages(list func(metav1.ListOptions) (token string, err error)) error {
	opts := metav1.ListOptions{Limit: 500}
	for {
		var err error
		if opts.Continue, err = list(opts); err != nil || opts.Continue == "" {
			return err
		}
	}
}

// EachEndpoint implements objects.
func (a apiObjects) EachEndpoint(ctx context.Context, f func(*v2.CiliumEndpoint)) error {
	return pages(func(o metav1.ListOptions) (string, error) {
		l, err := a.cilium.Endpoints.List(ctx, o)
		for i := range l.Items {
			f(&l.Items[i])
		}
		return l.Continue, err
	})
}

// EachIdentity implements objects.
func (a apiObjects) EachIdentity(ctx context.Context, f func(*v2.CiliumIdentity)) error {
	return pages(func(o metav1.ListOptions) (string, error) {
		l, err := a.cilium.Identities.List(ctx, o)
		for i := range l.Items {
			f(&l.Items[i])
		}
		return l.Continue, err
	})
}

// EachPod implements objects.
func (a apiObjects) EachPod(ctx context.Context, f func(*corev1.Pod)) error {
	return pages(func(o metav1.ListOptions) (string, error) {
		l, err := a.clientset.CoreV1().Pods("").List(ctx, o)
		if err != nil {
			return "", err
		}
		for i := range l.Items {
			f(&l.Items[i])
		}
		return l.Continue, nil
	})
}

// DeleteEndpoint implements objects.
func (a apiObjects) DeleteEndpoint(ctx context.Context, namespace, name string, uid types.UID) error {
	return a.cilium.Endpoints.In(namespace).Delete(ctx, name, uid, "")
}

// DeleteIdentity implements objects.
func (a apiObjects) DeleteIdentity(ctx context.Context, name string, uid types.UID, version string) error {
	return a.cilium.Identities.Delete(ctx, name, uid, version)
}

// MarkIdentity implements objects.
func (a apiObjects) MarkIdentity(ctx context.Context, name, version string, since time.Time) error {
	var value any
	if !since.IsZero() {
		value = since.UTC().Format(time.RFC3339Nano)
	}
	patch, err := json.Marshal(map[string]any{"metadata": map[string]any{"resourceVersion": version, "annotations": map[string]any{v2.UnusedAnnotation: value}}})
	if err != nil {
		return err
	}
	_, err = a.cilium.Identities.Patch(ctx, name, types.MergePatchType, patch)
	return err
}
