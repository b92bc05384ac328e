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
