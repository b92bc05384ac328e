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

// NodesResource is the resource name of CiliumNodes.
const NodesResource = "ciliumnodes"

// AddToScheme registers the types of this package.
func AddToScheme(s *runtime.Scheme) error {
	s.AddKnownTypes(GroupVersion, &CiliumNode{}, &CiliumNodeList{})
	metav1.AddToGroupVersion(s, GroupVersion)
	return nil
}

// Nodes reads and writes the CiliumNodes of a cluster.
type Nodes struct {
	rest   rest.Interface
	params runtime.ParameterCodec
}

// NewNodes returns a client for the API server that config leads to. config is not changed.
func NewNodes(config *rest.Config) (*Nodes, error) {
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
	return &Nodes{client, runtime.NewParameterCodec(scheme)}, nil
}

// Get returns one CiliumNode.
func (n *Nodes) Get(ctx context.Context, name string) (*CiliumNode, error) {
	out := &CiliumNode{}
	return out, n.rest.Get().Resource(NodesResource).Name(name).Do(ctx).Into(out)
}

// List returns all CiliumNodes.
func (n *Nodes) List(ctx context.Context, opts metav1.ListOptions) (*CiliumNodeList, error) {
	out := &CiliumNodeList{}
	return out, n.rest.Get().Resource(NodesResource).VersionedParams(&opts, n.params).Do(ctx).Into(out)
}

// Watch reports changes of CiliumNodes.
func (n *Nodes) Watch(ctx context.Context, opts metav1.ListOptions) (watch.Interface, error) {
	opts.Watch = true
	return n.rest.Get().Resource(NodesResource).VersionedParams(&opts, n.params).Watch(ctx)
}

// Create creates node.
func (n *Nodes) Create(ctx context.Context, node *CiliumNode) (*CiliumNode, error) {
	out := &CiliumNode{}
	return out, n.rest.Post().Resource(NodesResource).Body(node).Do(ctx).Into(out)
}

// Update replaces the spec of the stored node; a conflict if it changed since it was read.
func (n *Nodes) Update(ctx context.Context, node *CiliumNode) (*CiliumNode, error) {
	out := &CiliumNode{}
	return out, n.rest.Put().Resource(NodesResource).Name(node.Name).Body(node).Do(ctx).Into(out)
}

// Patch changes part of the stored node; subresources is "status" or nothing.
func (n *Nodes) Patch(ctx context.Context, name string, pt types.PatchType, data []byte, subresources ...string) (*CiliumNode, error) {
	out := &CiliumNode{}
	return out, n.rest.Patch(pt).Resource(NodesResource).Name(name).SubResource(subresources...).Body(data).Do(ctx).Into(out)
}

// Delete deletes a node, with the precondition that it is still the object with uid if that is not empty.
func (n *Nodes) Delete(ctx context.Context, name string, uid types.UID) error {
	opts := &metav1.DeleteOptions{}
	if uid != "" {
		opts.Preconditions = &metav1.Preconditions{UID: &uid}
	}
	return n.rest.Delete().Resource(NodesResource).Name(name).Body(opts).Do(ctx).Error()
}
