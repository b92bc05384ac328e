// SPDX-License-Identifier: Apache-2.0

package k8s

import (
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"reflect"
	"strings"
	"sync"
	"unique"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	v2 "github.com/lash-net/lash/api/v2"
	"github.com/lash-net/lash/internal/model"
	"github.com/lash-net/lash/internal/reconcile"
	"github.com/lash-net/lash/internal/state"
)

// Endpoints is the CiliumEndpoints of this node's pods, as a target. It lists from the table, which must be complete;
// self are the node's addresses. Compare with state.PublishedEndpoint.Same.
func (c *Client) Endpoints(t *state.Tables, self func() []netip.Addr) reconcile.Target[string, state.PublishedEndpoint] {
	return &endpoints{api: c.cilium.Endpoints, tables: t, self: self, known: map[string]written{}}
}

type endpoints struct {
	api    *v2.Endpoints
	tables *state.Tables
	self   func() []netip.Addr

	mu    sync.Mutex
	known map[string]written // objects that are ours
}

// written names an object and the pod it belongs to, by their UIDs.
type written struct {
	uid types.UID
	pod string
}

// List implements reconcile.Target.
func (e *endpoints) List(context.Context) (map[string]state.PublishedEndpoint, error) {
	self := map[netip.Addr]bool{}
	for _, a := range e.self() {
		self[a] = true
	}
	rows := map[string]state.PublishedEndpoint{}
	for r := range e.tables.CiliumEndpoints.All(e.tables.DB.ReadTxn()) {
		if self[r.Node] {
			rows[r.Key()] = state.PublishedEndpoint{CiliumEndpoint: r}
			e.remember(r.Key(), written{types.UID(r.UID), r.PodUID})
		}
	}
	return rows, nil
}

// Put implements reconcile.Target. An object of an earlier pod with the same name, here or elsewhere, is replaced.
func (e *endpoints) Put(ctx context.Context, key string, v state.PublishedEndpoint) error {
	api, want := e.api.In(v.Namespace), endpointObject(v)
	if w, ok := e.get(key); ok && w.pod == v.PodUID {
		err := e.setStatus(ctx, api, w.uid, want)
		if !apierrors.IsNotFound(err) && !apierrors.IsInvalid(err) {
			return err
		}
		e.forget(key) // it is gone, or is another object by now
	}
	have, err := api.Create(ctx, want)
	if apierrors.IsAlreadyExists(err) {
		if have, err = api.Get(ctx, v.Name); err != nil {
			return err
		}
		if owner(have) != v.PodUID {
			if err := api.Delete(ctx, v.Name, have.UID, ""); err != nil && !apierrors.IsNotFound(err) {
				return err
			}
			have, err = api.Create(ctx, want)
		}
	}
	if err != nil {
		return err
	}
	e.remember(key, written{have.UID, v.PodUID})
	if reflect.DeepEqual(have.Status, want.Status) {
		return nil
	}
	return e.setStatus(ctx, api, have.UID, want)
}

// setStatus replaces the status of the object with uid; a definition of somebody else's may have it as a subresource,
// which only its own path changes.
func (e *endpoints) setStatus(ctx context.Context, api *v2.Endpoints, uid types.UID, want *v2.CiliumEndpoint) error {
	patch, err := json.Marshal([]map[string]any{
		{"op": "test", "path": "/metadata/uid", "value": uid},
		{"op": "add", "path": "/status", "value": want.Status},
	})
	if err != nil {
		return err
	}
	have, err := api.Patch(ctx, want.Name, types.JSONPatchType, patch)
	if err != nil {
		return err
	}
	got, _ := convertEndpoint(have)
	wanted, _ := convertEndpoint(want)
	got.PodUID, wanted.PodUID = "", ""
	if (state.PublishedEndpoint{CiliumEndpoint: got}).Same(state.PublishedEndpoint{CiliumEndpoint: wanted}) {
		return nil
	}
	_, err = api.Patch(ctx, want.Name, types.JSONPatchType, patch, "status")
	return err
}

// Delete implements reconcile.Target. An object that another pod or node has put in the place of ours is left alone.
func (e *endpoints) Delete(ctx context.Context, key string) error {
	w, ok := e.get(key)
	if !ok {
		return nil // never seen and never written
	}
	namespace, name, _ := strings.Cut(key, "/")
	err := e.api.In(namespace).Delete(ctx, name, w.uid, "")
	if err != nil && !apierrors.IsNotFound(err) && !apierrors.IsConflict(err) {
		return err
	}
	e.forget(key)
	return nil
}

func (e *endpoints) get(key string) (written, bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	w, ok := e.known[key]
	return w, ok
}

func (e *endpoints) remember(key string, w written) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.known[key] = w
}

func (e *endpoints) forget(key string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	delete(e.known, key)
}

func endpointObject(v state.PublishedEndpoint) *v2.CiliumEndpoint {
	o := &v2.CiliumEndpoint{ObjectMeta: metav1.ObjectMeta{
		Name: v.Name, Namespace: v.Namespace,
		OwnerReferences: []metav1.OwnerReference{{APIVersion: "v1", Kind: "Pod", Name: v.Name, UID: types.UID(v.PodUID)}},
	}}
	pair := v2.AddressPair{}
	if v.IPv4.IsValid() {
		pair.IPv4 = v.IPv4.String()
	}
	if v.IPv6.IsValid() {
		pair.IPv6 = v.IPv6.String()
	}
	o.Status = v2.EndpointStatus{
		ID: int64(v.EndpointID), State: v.State,
		Identity:    &v2.EndpointIdentity{ID: int64(v.Identity), Labels: v.Labels.List()},
		Networking:  &v2.EndpointNetworking{Addressing: []v2.AddressPair{pair}, Node: v.Node.String()},
		ExternalIDs: v2.EndpointExternalIDs{ContainerID: v.ContainerID, K8sNamespace: v.Namespace, K8sPodName: v.Name, PodName: v.Key()},
	}
	for _, p := range v.Ports {
		o.Status.NamedPorts = append(o.Status.NamedPorts, v2.NamedPort{Name: p.Name, Port: p.Port, Protocol: model.ProtoName(p.Proto)})
	}
	return o
}

// owner is the UID of the pod an object belongs to.
func owner(o *v2.CiliumEndpoint) string {
	for _, ref := range o.OwnerReferences {
		if ref.Kind == "Pod" {
			return string(ref.UID)
		}
	}
	return ""
}

func convertEndpoint(o *v2.CiliumEndpoint) (state.CiliumEndpoint, problems) {
	var p problems
	row := state.CiliumEndpoint{
		Namespace: shared(o.Namespace), Name: o.Name, UID: string(o.UID), PodUID: owner(o), Created: o.CreationTimestamp.Unix(),
		EndpointID: uint16(o.Status.ID), State: shared(o.Status.State),
	}
	if id := o.Status.Identity; id != nil && id.ID > 0 && id.ID < 1<<32 {
		row.Identity = model.Identity(id.ID)
	}
	n := o.Status.Networking
	if n == nil {
		return row, p
	}
	if n.Node != "" {
		row.Node, _ = p.addr("status.networking.node", n.Node)
	}
	for i, pair := range n.Addressing {
		for _, f := range []struct {
			field, s string
			v4       bool
			dst      *netip.Addr
		}{{"ipv4", pair.IPv4, true, &row.IPv4}, {"ipv6", pair.IPv6, false, &row.IPv6}} {
			if f.s == "" {
				continue
			}
			field := fmt.Sprintf("status.networking.addressing[%d].%s", i, f.field)
			if a, ok := p.addr(field, f.s); !ok {
				continue
			} else if a.Is4() != f.v4 {
				p.add(field, "%s is of the other family", a)
			} else if !f.dst.IsValid() {
				*f.dst = a
			}
		}
	}
	return row, p
}

// shared is s in memory that all rows with the same string share.
func shared(s string) string { return unique.Make(s).Value() }
