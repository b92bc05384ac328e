// SPDX-License-Identifier: Apache-2.0

package v2

import (
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// CiliumEndpoint is the network side of a pod, whose name it has and to which it belongs.
type CiliumEndpoint struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata"`

	Status EndpointStatus `json:"status,omitzero"`
}

// CiliumEndpointList is a list of CiliumEndpoints.
type CiliumEndpointList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata"`

	Items []CiliumEndpoint `json:"items"`
}

// EndpointStatus is all there is to an endpoint.
type EndpointStatus struct {
	ID          int64               `json:"id,omitempty"` // on its node
	State       string              `json:"state,omitempty"`
	Identity    *EndpointIdentity   `json:"identity,omitempty"`
	Networking  *EndpointNetworking `json:"networking,omitempty"`
	NamedPorts  []NamedPort         `json:"named-ports,omitempty"`
	ExternalIDs EndpointExternalIDs `json:"external-identifiers,omitzero"`
}

// EndpointIdentity is the endpoint's security identity.
type EndpointIdentity struct {
	ID     int64    `json:"id,omitempty"`
	Labels []string `json:"labels,omitempty"` // "k8s:app=web"
}

// EndpointNetworking says where the endpoint is.
type EndpointNetworking struct {
	Addressing []AddressPair `json:"addressing"`
	Node       string        `json:"node,omitempty"` // address of its node
}

// AddressPair is an address of each family.
type AddressPair struct {
	IPv4 string `json:"ipv4,omitempty"`
	IPv6 string `json:"ipv6,omitempty"`
}

// NamedPort is a container's port that has a name.
type NamedPort struct {
	Name     string `json:"name,omitempty"`
	Port     uint16 `json:"port,omitempty"`
	Protocol string `json:"protocol,omitempty"` // TCP, UDP or SCTP
}

// EndpointExternalIDs are what others call the endpoint.
type EndpointExternalIDs struct {
	ContainerID  string `json:"container-id,omitempty"`
	K8sNamespace string `json:"k8s-namespace,omitempty"`
	K8sPodName   string `json:"k8s-pod-name,omitempty"`
	PodName      string `json:"pod-name,omitempty"` // namespace/name
}
