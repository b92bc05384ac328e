/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* Reasons and counters. Functions of the libraries return 0 or a negative drop
 * reason made by DROP(), which notes file and line; only the hook files turn it
 * into a verdict, by drop() of event.h. */
#ifndef LASH_DROP_H
#define LASH_DROP_H

#include "../maps.h"

/* Numbers are those that decoders of the field know; 130 and above are drops. */
enum drop_reason {
	DROP_INVALID_SOURCE  = 132, /* Invalid source ip */
	DROP_POLICY          = 133, /* Policy denied */
	DROP_INVALID         = 134, /* Invalid packet */
	DROP_CT_INVALID      = 135, /* CT: Truncated or invalid header */
	DROP_UNSUPPORTED_L3  = 139, /* Unsupported L3 protocol */
	DROP_WRITE           = 141, /* Error writing to packet */
	DROP_TUNNEL_KEY      = 147, /* Tunnel key error */
	DROP_UNROUTABLE      = 151, /* Stale or unroutable IP */
	DROP_CT_INSERT       = 155, /* CT: Map insertion failed */
	DROP_IPV6_EXTENSION  = 156, /* Invalid IPv6 extension header */
	DROP_NO_SERVICE      = 158, /* Service backend not found */
	DROP_NAT_EXHAUSTED   = 167, /* No mapping for NAT masquerade */
	DROP_NAT_PROTO       = 168, /* Unsupported protocol for NAT masquerade */
	DROP_FIB             = 169, /* FIB lookup failed */
	DROP_INVALID_IDENTITY = 171, /* Invalid identity */
	DROP_UNKNOWN_SENDER  = 172, /* Unknown sender */
	DROP_CLUSTER_IP      = 174, /* Is a ClusterIP */
	DROP_NO_FRAGMENT     = 175, /* First logical datagram fragment not found */
	DROP_ICMPV6          = 176, /* Forbidden ICMPv6 message */
	DROP_UNSUPPORTED_L2  = 166, /* Unsupported L2 protocol */
	DROP_SOURCE_RANGE    = 177, /* Denied by LB src range check */
	DROP_DENYLIST        = 181, /* Policy denied by denylist */
	DROP_VLAN            = 182, /* VLAN traffic disallowed by VLAN filter */
	DROP_TTL             = 196, /* TTL exceeded */
	DROP_NO_ENDPOINT     = 203, /* Endpoint program not available */
	DROP_TUPLE_TAKEN     = 254, /* DSR: Tuple of another connection; Lash's own */
};

enum file_id {
	FILE_POD = 1, FILE_NETDEV, FILE_HOST, FILE_SOCK,
	FILE_PARSE, FILE_CONN, FILE_NAT, FILE_FIB, FILE_NEIGH, FILE_ROUTE, FILE_OVERLAY,
	FILE_LB, FILE_DSR, FILE_SNAT, FILE_XDP,
};

#define DROP(p, reason) ({ (p)->line = __LINE__; (p)->file = FILE_ID; -(int)(reason); })

static __always_inline void count(enum hook hook, enum slow_reason why, __u32 bytes)
{
	__u32 row = hook * COUNT_ROWS + why;
	struct count *c = bpf_map_lookup_elem(&lash_counts, &row);

	if (c) {
		c->packets++;
		c->bytes += bytes;
	}
}

#endif
