// SPDX-License-Identifier: Apache-2.0

// Package v2 holds the Go types of the Kubernetes API group cilium.io, version v2, as far as Lash reads and writes
// them. The group and the names are those of the objects users already have: theirs must work unchanged.
//
// Who writes what of a CiliumNode: the agent of the node creates it and owns spec.addresses, spec.health and
// status.ipam.used; the operator owns spec.ipam.podCIDRs and status.ipam.operator-status, and deletes the object when
// its Node is gone. A CiliumIdentity is created by any agent whose pods' labels have no number yet, and never changed
// but for its annotation; the operator marks those without a user and deletes them later. A CiliumEndpoint is created,
// kept and deleted by the agent of its pod's node; the operator deletes those whose pod is gone.
package v2
