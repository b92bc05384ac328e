// SPDX-License-Identifier: Apache-2.0

package v2

import (
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// Types of a NodeAddress.
const (
	InternalIP       = "InternalIP"       // of the node, as in the Node object
	ExternalIP       = "ExternalIP"       // of the node, as in the Node object
	CiliumInternalIP = "CiliumInternalIP" // the router: the address of lash_host
)

// TunnelAnnotation names the protocol and the port by which a node takes encapsulated packets: "vxlan:8472". Without it
// it takes none.
const TunnelAnnotation = "lash.io/tunnel"

// CiliumNode is what the other nodes know of a node: its addresses and the CIDRs of its pods. It has the node's name.
type CiliumNode struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata"`

	Spec   NodeSpec   `json:"spec"`
	Status NodeStatus `json:"status,omitzero"`
}

// CiliumNodeList is a list of CiliumNodes.
type CiliumNodeList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata"`

	Items []CiliumNode `json:"items"`
}

// NodeSpec describes a node.
type NodeSpec struct {
	InstanceID   string           `json:"instance-id,omitempty"` // of the machine, as its cloud calls it
	BootID       string           `json:"bootid,omitempty"`      // changes when the machine boots
	Addresses    []NodeAddress    `json:"addresses,omitempty"`
	Health       HealthAddressing `json:"health,omitzero"`
	Ingress      HealthAddressing `json:"ingress,omitzero"`
	Encryption   NodeEncryption   `json:"encryption,omitzero"`
	IPAM         NodeIPAM         `json:"ipam,omitzero"`
	NodeIdentity uint64           `json:"nodeidentity,omitempty"`
}

// NodeAddress is one address of a node.
type NodeAddress struct {
	Type string `json:"type,omitempty"`
	IP   string `json:"ip,omitempty"`
}

// HealthAddressing is an address of each family.
type HealthAddressing struct {
	IPv4 string `json:"ipv4,omitempty"`
	IPv6 string `json:"ipv6,omitempty"`
}

// NodeEncryption is the encryption key in use by the node; 0 means none.
type NodeEncryption struct {
	Key int `json:"key,omitempty"`
}

// NodeIPAM is the part of the address space that belongs to the node.
type NodeIPAM struct {
	PodCIDRs []string `json:"podCIDRs,omitempty"` // at most one a family, IPv4 first
}

// NodeStatus is what was found out about a node.
type NodeStatus struct {
	IPAM NodeIPAMStatus `json:"ipam,omitzero"`
}

// NodeIPAMStatus is the state of the node's address space.
type NodeIPAMStatus struct {
	Used           map[string]AllocationIP `json:"used,omitempty"` // by address
	OperatorStatus OperatorStatus          `json:"operator-status,omitzero"`
}

// AllocationIP says who has an address.
type AllocationIP struct {
	Owner    string `json:"owner,omitempty"` // namespace/pod, or router
	Resource string `json:"resource,omitempty"`
}

// OperatorStatus is the operator's word to the node.
type OperatorStatus struct {
	Error string `json:"error,omitempty"` // why the node has no pod CIDR, and what to do about it
}

// Addr returns the node's first address of the type, "" if it has none.
func (s *NodeSpec) Addr(typ string) string {
	for _, a := range s.Addresses {
		if a.Type == typ {
			return a.IP
		}
	}
	return ""
}
