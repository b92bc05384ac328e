// SPDX-License-Identifier: Apache-2.0

package v2

import (
	"context"
	"fmt"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/rest"
)

// GroupVersion of everything in this package.
var GroupVersion = schema.GroupVersion{Group: "cilium.io", Version: "v2"}

// Resource names of the kinds.
const (
	NodesResource      = "ciliumnodes"
	IdentitiesResource = "ciliumidentities"
	EndpointsResource  = "ciliumendpoints"
)

// AddToScheme registers the types of this package.
func AddToScheme(s *runtime.Scheme) error {
	s.AddKnownTypes(GroupVersion, &CiliumNode{}, &CiliumNodeList{}, &CiliumIdentity{}, &CiliumIdentityList{}, &CiliumEndpoint{}, &CiliumEndpointList{})
	metav1.AddToGroupVersion(s, GroupVersion)
	return nil
}

// Clients read and write the objects of each kind.
type Clients struct {
	Nodes      *Nodes
	Identities *Identities
	Endpoints  *Endpoints // In chooses the namespace; without it lists and watches are of all
}

// The clients of the kinds.
type (
	Nodes      = Resource[CiliumNode, CiliumNodeList, *CiliumNode, *CiliumNodeList]
	Identities = Resource[CiliumIdentity, CiliumIdentityList, *CiliumIdentity, *CiliumIdentityList]
	Endpoints  = Resource[CiliumEndpoint, CiliumEndpointList, *CiliumEndpoint, *CiliumEndpointList]
)

// New returns clients for the API server that config leads to; they share its rate limit. config is not changed.
func New(config *rest.Config) (*Clients, error) {
	scheme := runtime.NewScheme()
	if err := AddToScheme(scheme); err != nil {
		return nil, err
	}
	c := rest.CopyConfig(config)
	c.GroupVersion = &GroupVersion
	c.APIPath = "/apis"
	c.ContentType = runtime.ContentTypeJSON // custom resources have no protobuf
	c.AcceptContentTypes = runtime.ContentTypeJSON
	c.NegotiatedSerializer = serializer.NewCodecFactory(scheme).WithoutConversion()
	client, err := rest.RESTClientFor(c)
	if err != nil {
		return nil, fmt.Errorf("client for %s: %w", GroupVersion, err)
	}
	params := runtime.NewParameterCodec(scheme)
	return &Clients{
		Nodes:      &Nodes{client, params, NodesResource, ""},
		Identities: &Identities{client, params, IdentitiesResource, ""},
		Endpoints:  &Endpoints{client, params, EndpointsResource, ""},
	}, nil
}

// object is a pointer to Obj that the API machinery can handle.
type object[Obj any] interface {
	*Obj
	runtime.Object
}

// named is an object that has a name.
type named[Obj any] interface {
	object[Obj]
	metav1.Object
}

// Resource reads and writes the objects of one kind, of all namespaces or of one.
type Resource[Obj, List any, P named[Obj], L object[List]] struct {
	rest      rest.Interface
	params    runtime.ParameterCodec
	resource  string
	namespace string
}

// In is the same for one namespace.
func (r *Resource[Obj, List, P, L]) In(namespace string) *Resource[Obj, List, P, L] {
	return &Resource[Obj, List, P, L]{r.rest, r.params, r.resource, namespace}
}

func (r *Resource[Obj, List, P, L]) request(req *rest.Request) *rest.Request {
	return req.NamespaceIfScoped(r.namespace, r.namespace != "").Resource(r.resource)
}

// Get returns one object.
func (r *Resource[Obj, List, P, L]) Get(ctx context.Context, name string) (*Obj, error) {
	out := P(new(Obj))
	return out, r.request(r.rest.Get()).Name(name).Do(ctx).Into(out)
}

// List returns all objects.
func (r *Resource[Obj, List, P, L]) List(ctx context.Context, opts metav1.ListOptions) (*List, error) {
	out := L(new(List))
	return out, r.request(r.rest.Get()).VersionedParams(&opts, r.params).Do(ctx).Into(out)
}

// Watch reports changes of objects.
func (r *Resource[Obj, List, P, L]) Watch(ctx context.Context, opts metav1.ListOptions) (watch.Interface, error) {
	opts.Watch = true
	body, err := r.request(r.rest.Get()).VersionedParams(&opts, r.params).Stream(ctx)
	if err != nil {
		return nil, err
	}
	return newWatcher[Obj, P](body), nil
}

// Create creates an object.
func (r *Resource[Obj, List, P, L]) Create(ctx context.Context, obj P) (*Obj, error) {
	out := P(new(Obj))
	return out, r.request(r.rest.Post()).Body(obj).Do(ctx).Into(out)
}

// Update replaces the stored object; a conflict if it changed since it was read.
func (r *Resource[Obj, List, P, L]) Update(ctx context.Context, obj P) (*Obj, error) {
	out := P(new(Obj))
	return out, r.request(r.rest.Put()).Name(obj.GetName()).Body(obj).Do(ctx).Into(out)
}

// Patch changes part of the stored object; subresources is "status" or nothing.
func (r *Resource[Obj, List, P, L]) Patch(ctx context.Context, name string, pt types.PatchType, data []byte, subresources ...string) (*Obj, error) {
	out := P(new(Obj))
	return out, r.request(r.rest.Patch(pt)).Name(name).SubResource(subresources...).Body(data).Do(ctx).Into(out)
}

// Delete deletes an object, with the precondition that it is still the one with uid, and unchanged since version, if
// these are not empty.
func (r *Resource[Obj, List, P, L]) Delete(ctx context.Context, name string, uid types.UID, version string) error {
	opts := &metav1.DeleteOptions{}
	if uid != "" || version != "" {
		opts.Preconditions = &metav1.Preconditions{}
	}
	if uid != "" {
		opts.Preconditions.UID = &uid
	}
	if version != "" {
		opts.Preconditions.ResourceVersion = &version
	}
	return r.request(r.rest.Delete()).Name(name).Body(opts).Do(ctx).Error()
}
