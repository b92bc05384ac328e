// SPDX-License-Identifier: Apache-2.0

package model

import (
	"net/netip"
	"strconv"
)

// Identity is the number of a set of security-relevant labels. Numbers up to 10 are reserved, 256 to 65535 are
// allocated cluster-wide; from 1<<24 on they mean something on this node only.
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
	IdentityWorldIPv4     Identity = 9
	IdentityWorldIPv6     Identity = 10

	IdentityMin Identity = 256   // smallest allocated identity
	IdentityMax Identity = 65535 // largest allocated identity

	// IdentityLocal is where the numbers of CIDRs begin. All of them are outside of the cluster.
	IdentityLocal Identity = 1 << 24
	// IdentityOutsideKubeAPIServer is an address of the API server that is no node's.
	IdentityOutsideKubeAPIServer = IdentityLocal + 1
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
	IdentityWorldIPv4:     "world-ipv4",
	IdentityWorldIPv6:     "world-ipv6",
}

// World is the identity of outside addresses of the family of a: where there are two families, each has its own.
func World(a netip.Addr, dual bool) Identity {
	switch {
	case !dual:
		return IdentityWorld
	case a.Is4():
		return IdentityWorldIPv4
	}
	return IdentityWorldIPv6
}

// World reports whether the identity is that of whatever is outside.
func (id Identity) World() bool {
	return id == IdentityWorld || id == IdentityWorldIPv4 || id == IdentityWorldIPv6
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

// FixedLabels are the labels of an identity that nobody allocates, nil for any other.
func (id Identity) FixedLabels() []string {
	switch {
	case id == IdentityKubeAPIServer:
		return []string{"reserved:kube-apiserver", "reserved:remote-node"}
	case id == IdentityOutsideKubeAPIServer:
		return []string{"reserved:kube-apiserver", "reserved:world"}
	case id.Reserved():
		return []string{id.String()}
	}
	return nil
}

// FixedIdentities are all that nobody allocates, in their order.
func FixedIdentities() []Identity {
	var ids []Identity
	for id := IdentityHost; id.Reserved(); id++ {
		ids = append(ids, id)
	}
	return append(ids, IdentityOutsideKubeAPIServer)
}
