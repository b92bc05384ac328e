// SPDX-License-Identifier: Apache-2.0

package k8s

import (
	"cmp"
	"context"
	"crypto/sha256"
	"fmt"
	"log/slog"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/lash-net/lash/internal/reconcile"
	"github.com/lash-net/lash/internal/state"
)

// Problem is what is wrong with an object, as its Event says.
type Problem struct {
	Kind, Namespace, Name, UID string
	Reason                     string // empty: NotServed
	Text                       string
}

// Events is a target that tells problems by Events on their objects. It knows of none that are told already, so that the
// loop's Reread is how often a lasting problem is told again. An Event has a name made of what it says: told twice, also
// by another replica, it is one Event, counted. It is history, and not deleted.
func (c *Client) Events(component string) reconcile.Target[Problem, struct{}] {
	return events{c, component}
}

type events struct {
	c         *Client
	component string
}

// List implements reconcile.Target.
func (events) List(context.Context) (map[Problem]struct{}, error) { return nil, nil }

// Delete implements reconcile.Target.
func (events) Delete(context.Context, Problem) error { return nil }

var apiVersions = map[string]string{"Node": "v1", "Service": "v1", "EndpointSlice": discoveryv1.SchemeGroupVersion.String()}

const maxEventText = 1024 // the API server's bound

// Put implements reconcile.Target.
func (e events) Put(ctx context.Context, p Problem, _ struct{}) error {
	now := metav1.Now()
	sum := sha256.Sum256([]byte(p.Kind + "\x00" + p.UID + "\x00" + p.Text))
	text := p.Text
	if len(text) > maxEventText {
		text = text[:maxEventText-3] + "..."
	}
	name := fmt.Sprintf("%.200s.%x", p.Name, sum[:8])
	namespace := p.Namespace
	if p.Kind == "Node" {
		namespace = "" // it has none; its Events do
	}
	want := &corev1.Event{
		ObjectMeta:     metav1.ObjectMeta{Namespace: p.Namespace, Name: name},
		InvolvedObject: corev1.ObjectReference{APIVersion: apiVersions[p.Kind], Kind: p.Kind, Namespace: namespace, Name: p.Name, UID: types.UID(p.UID)},
		Type:           corev1.EventTypeWarning, Reason: cmp.Or(p.Reason, "NotServed"), Message: text,
		Source: corev1.EventSource{Component: e.component}, ReportingController: "lash.io/" + e.component,
		FirstTimestamp: now, LastTimestamp: now, Count: 1,
	}
	api := e.c.core
	err := api.Post().Namespace(p.Namespace).Resource("events").Body(want).Do(ctx).Error()
	if !apierrors.IsAlreadyExists(err) {
		return err
	}
	var have corev1.Event
	if err := api.Get().Namespace(p.Namespace).Resource("events").Name(name).Do(ctx).Into(&have); err != nil {
		return err
	}
	patch := fmt.Appendf(nil, `{"count":%d,"lastTimestamp":%q}`, have.Count+1, now.UTC().Format("2006-01-02T15:04:05Z"))
	return api.Patch(types.MergePatchType).Namespace(p.Namespace).Resource("events").Name(name).Body(patch).Do(ctx).Error()
}

// ServiceValidators prepares reflectors that read services, and of slices their ports and what is wrong with them, also
// those of no service.
func ServiceValidators(c *Client, t *state.Tables, proxy string, log *slog.Logger) []*Reflector {
	return []*Reflector{
		newReflector(t, log, spec[corev1.Service, state.Service]{
			name: "core/v1::Service", kind: "Service", table: t.Services, convert: convertService, equal: state.Service.Equal,
			lw: listWatch[corev1.ServiceList](c, c.core, "services", nil, ofServices(proxy)),
		}),
		newReflector(t, log, spec[discoveryv1.EndpointSlice, state.EndpointSlice]{
			name: "discovery/v1::EndpointSlice", kind: "EndpointSlice", table: t.Slices, equal: state.EndpointSlice.Equal,
			convert: func(s *discoveryv1.EndpointSlice) (state.EndpointSlice, problems) {
				row, p := convertSlice(s)
				row.Endpoints = nil
				if row.Service == "" {
					p.add("metadata.labels["+discoveryv1.LabelServiceName+"]", "is missing: the slice belongs to no service")
				}
				return row, p
			},
			lw: listWatch[discoveryv1.EndpointSliceList](c, c.discovery, "endpointslices", nil, ofServices(proxy)),
		}),
	}
}
