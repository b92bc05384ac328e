// SPDX-License-Identifier: Apache-2.0

package model

import "strconv"

// Identity is the number of a set of security-relevant labels. Numbers up to 8 are reserved, 256 to 65535 are
// allocated cluster-wide.
type Identity uint32

// The reserved identities, numbered as the cilium.io API has them.
const (
	IdentityUnknown       Identity = 0
	IdentityHost          Identity = 1
	IdentityWorld         Identity = 2
	IdentityUnmanaged     Identity = 3
	IdentityHealth        Identity = 4
	IdentityInit          Identity = 5
	IdentityRemoteNode    Identity = 6
	IdentityKubeAPIServer Identity = 7
	IdentityIngress       Identity = 8

	IdentityMin Identity = 256   // smallest allocated identity
	IdentityMax Identity = 65535 // largest allocated identity
)

var reservedNames = [...]string{
	IdentityUnknown:       "unknown",
	IdentityHost:          "host",
	IdentityWorld:         "world",
	IdentityUnmanaged:     "unmanaged",
	IdentityHealth:        "health",
	IdentityInit:          "init",
	IdentityRemoteNode:    "remote-node",
	IdentityKubeAPIServer: "kube-apiserver",
	IdentityIngress:       "ingress",
}

// Reserved reports whether the identity is one of the fixed ones.
func (id Identity) Reserved() bool { return int(id) < len(reservedNames) }

// String is "reserved:host" for a reserved identity and the decimal number for any other.
func (id Identity) String() string {
	if id.Reserved() {
		return "reserved:" + reservedNames[id]
	}
	return strconv.FormatUint(uint64(id), 10)
}
