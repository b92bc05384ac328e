// SPDX-License-Identifier: Apache-2.0

package v2

import (
	"maps"
	"slices"

	"k8s.io/apimachinery/pkg/runtime"
)

// DeepCopy returns a copy that shares nothing with n.
func (n *CiliumNode) DeepCopy() *CiliumNode {
	if n == nil {
		return nil
	}
	out := *n
	n.ObjectMeta.DeepCopyInto(&out.ObjectMeta)
	out.Spec.Addresses = slices.Clone(n.Spec.Addresses)
	out.Spec.IPAM.PodCIDRs = slices.Clone(n.Spec.IPAM.PodCIDRs)
	out.Status.IPAM.Used = maps.Clone(n.Status.IPAM.Used)
	return &out
}

// DeepCopyObject implements runtime.Object.
func (n *CiliumNode) DeepCopyObject() runtime.Object { return n.DeepCopy() }

// DeepCopyObject implements runtime.Object.
func (l *CiliumNodeList) DeepCopyObject() runtime.Object {
	out := *l
	l.ListMeta.DeepCopyInto(&out.ListMeta)
	out.Items = make([]CiliumNode, len(l.Items))
	for i := range l.Items {
		out.Items[i] = *l.Items[i].DeepCopy()
	}
	return &out
}

// DeepCopy returns a copy that shares nothing with i.
func (i *CiliumIdentity) DeepCopy() *CiliumIdentity {
	if i == nil {
		return nil
	}
	out := *i
	i.ObjectMeta.DeepCopyInto(&out.ObjectMeta)
	out.SecurityLabels = maps.Clone(i.SecurityLabels)
	return &out
}

// DeepCopyObject implements runtime.Object.
func (i *CiliumIdentity) DeepCopyObject() runtime.Object { return i.DeepCopy() }

// DeepCopyObject implements runtime.Object.
func (l *CiliumIdentityList) DeepCopyObject() runtime.Object {
	out := *l
	l.ListMeta.DeepCopyInto(&out.ListMeta)
	out.Items = make([]CiliumIdentity, len(l.Items))
	for i := range l.Items {
		out.Items[i] = *l.Items[i].DeepCopy()
	}
	return &out
}

// DeepCopy returns a copy that shares nothing with e.
func (e *CiliumEndpoint) DeepCopy() *CiliumEndpoint {
	if e == nil {
		return nil
	}
	out := *e
	e.ObjectMeta.DeepCopyInto(&out.ObjectMeta)
	if id := e.Status.Identity; id != nil {
		out.Status.Identity = &EndpointIdentity{id.ID, slices.Clone(id.Labels)}
	}
	if n := e.Status.Networking; n != nil {
		out.Status.Networking = &EndpointNetworking{slices.Clone(n.Addressing), n.Node}
	}
	out.Status.NamedPorts = slices.Clone(e.Status.NamedPorts)
	return &out
}

// DeepCopyObject implements runtime.Object.
func (e *CiliumEndpoint) DeepCopyObject() runtime.Object { return e.DeepCopy() }

// DeepCopyObject implements runtime.Object.
func (l *CiliumEndpointList) DeepCopyObject() runtime.Object {
	out := *l
	l.ListMeta.DeepCopyInto(&out.ListMeta)
	out.Items = make([]CiliumEndpoint, len(l.Items))
	for i := range l.Items {
		out.Items[i] = *l.Items[i].DeepCopy()
	}
	return &out
}
