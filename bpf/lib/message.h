/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* What lash_events carries: struct event_head, then a message, then the packet's
 * first bytes. The messages have the layouts and numbers that the field's decoders
 * know (trace and drop notifications of version 1). */
#ifndef LASH_MESSAGE_H
#define LASH_MESSAGE_H

#include "../include/helpers.h"

#define CAPTURE_MAX 128          /* bytes of the packet at most */

struct event_head {
	__u64 time;              /* nanoseconds of the monotonic clock */
	__u16 cpu;
	__u16 len;               /* of the message and what is captured, bytes */
	__u32 lost;              /* 0 in the ring; the agent's stream tells losses with it */
};

enum event_type {
	EVENT_DROP = 1, EVENT_DEBUG, EVENT_CAPTURE, EVENT_TRACE, EVENT_VERDICT,
	EVENT_AGENT = 130,       /* never in the ring: the agent's own */
};

struct message {
	__u8 type;               /* enum event_type */
	__u8 subtype;            /* reason, enum trace_point or enum debug_type */
	__u16 source;            /* endpoint; 0: none of this node */
	__u32 hash;              /* of the packet, as the kernel has it */
};

struct captured {
	__u32 len_orig;          /* of the frame, bytes */
	__u16 len_cap;           /* of it here */
	__u16 version;
};

enum trace_point {
	TRACE_TO_ENDPOINT, TRACE_TO_PROXY, TRACE_TO_HOST, TRACE_TO_STACK, TRACE_TO_OVERLAY,
	TRACE_FROM_ENDPOINT, TRACE_FROM_PROXY, TRACE_FROM_HOST, TRACE_FROM_STACK, TRACE_FROM_OVERLAY,
	TRACE_FROM_NETWORK, TRACE_TO_NETWORK, TRACE_FROM_CRYPTO, TRACE_TO_CRYPTO,
};

enum trace_reason {
	TRACE_NEW, TRACE_ESTABLISHED, TRACE_REPLY, TRACE_RELATED, TRACE_REOPENED, TRACE_UNKNOWN,
	TRACE_NOT = 0xff,        /* never sent: this packet is not to be told about */
};

enum trace_flags {
	TRACE_IPV6 = 1,
};

struct trace_notify {
	struct message head;
	struct captured cap;
	__u32 src_identity;
	__u32 dst_identity;
	__u16 dst_id;            /* endpoint; 0: none of this node */
	__u8 reason;             /* enum trace_reason */
	__u8 flags;              /* enum trace_flags */
	__u32 ifindex;           /* 0: none */
	__u8 orig_ip[16];        /* IPv4: the first four; zero: not told */
};

struct drop_notify {
	struct message head;
	struct captured cap;
	__u32 src_identity;
	__u32 dst_identity;
	__u32 dst_id;
	__u16 line;
	__u8 file;               /* enum file_id */
	__s8 ext_error;
	__u32 ifindex;
};

struct capture_notify {
	struct message head;
	struct captured cap;
	__u32 arg1;
	__u32 arg2;
};

enum capture_point {
	CAPTURE_SNAT_PRE = 10, CAPTURE_SNAT_POST,
};

struct verdict_notify {
	struct message head;
	struct captured cap;
	__u32 remote_identity;
	__s32 verdict;           /* 0 allow, >0 proxy port, <0 drop reason */
	__u16 dst_port;          /* host order */
	__u8 proto;
	__u8 flags;              /* enum verdict_flags, match type from bit 3 */
	__u8 auth_type;
	__u8 pad[3];
	__u32 cookie;            /* of the rule */
};

enum verdict_flags {
	VERDICT_INGRESS = 1, VERDICT_EGRESS = 2, VERDICT_IPV6 = 4, VERDICT_AUDITED = 64, VERDICT_L3_DEVICE = 128,
};

struct debug_notify {
	struct message head;
	__u32 arg1, arg2, arg3;
};

/* Only those that Lash says; there are more. */
enum debug_type {
	DEBUG_LOCAL_DELIVERY = 2, /* endpoint, identity of the sender */
	DEBUG_ENCAP          = 3, /* node's IPv4 address, identity of the sender */
	DEBUG_CT_MATCH       = 8, /* lifetime, reverse NAT */
	DEBUG_CT_VERDICT     = 15, /* enum trace_reason, reverse NAT */
	DEBUG_DECAP          = 16, /* VNI, flow label */
	DEBUG_CT_LOOKUP4_1   = 48, /* source, destination, ports */
	DEBUG_CT_LOOKUP4_2   = 49, /* protocol << 8 | 1: egress */
	DEBUG_CT_CREATED4    = 50, /* proxy port and reverse NAT, identity of the source, LB address */
	DEBUG_CT_LOOKUP6_1   = 51, /* the last words of the addresses */
	DEBUG_CT_LOOKUP6_2   = 52,
	DEBUG_CT_CREATED6    = 53,
	DEBUG_NO_IDENTITY4   = 56, /* address */
	DEBUG_NO_IDENTITY6   = 57,
	DEBUG_IDENTITY4      = 58, /* address, identity */
	DEBUG_IDENTITY6      = 59,
};

#endif
