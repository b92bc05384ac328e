/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* Telling about packets: which ones, and what. Events are made in the ring's own
 * memory. The functions that make them are global, so that the verifier reads them once
 * and not once for each way that leads to them; they take the packet from
 * lash_scratch, where slow_pkt() puts it. */
#ifndef LASH_EVENT_H
#define LASH_EVENT_H

#include "nat.h"
#include "message.h"

#define FILE_ID FILE_ROUTE

/* conn_due: a packet of this direction is worth an event. The one question of the fast path. */
static __always_inline bool conn_due(const struct runtime *rt, const struct conn_dir *d, const struct pkt *p, __u32 now)
{
	return (((p->tcp | REPORT_EVERY | REPORT_FIRST) & rt->report & ~d->seen) | past(now, d->due)) != 0;
}

/* tell_as: what the packet is to its connection. By way of memory that the verifier takes as
 * unknown: it would follow each answer through all that comes after. */
static __always_inline enum trace_reason tell_as(const struct conn_dir *d, const struct pkt *p, bool orig)
{
	__u32 zero = 0;
	struct scratch *scratch = bpf_map_lookup_elem(&lash_scratch, &zero);

	if (!scratch)
		return TRACE_NOT;
	*(volatile __u32 *)&scratch->tell = p->flags & PKT_ICMP_ERROR ? TRACE_RELATED :
					    !orig ? TRACE_REPLY : d->packets > 1 ? TRACE_ESTABLISHED : TRACE_NEW;
	return *(volatile __u32 *)&scratch->tell;
}

/* conn_tell: whether to tell about this packet, which conn_see has seen, and as what.
 * The answer is for one event: it takes note that there was one. */
static __always_inline enum trace_reason conn_tell(struct conn_dir *d, const struct pkt *p, bool orig)
{
	__u32 zero = 0, now = ticks();
	struct runtime *rt = bpf_map_lookup_elem(&lash_runtime, &zero);

	if (!rt || !conn_due(rt, d, p, now))
		return TRACE_NOT;
	d->due = now + (rt->interval ?: FOREVER);
	if (!rt->report)
		return TRACE_NOT;
	d->seen |= p->tcp | REPORT_FIRST;
	return tell_as(d, p, orig);
}

/* conn_tell_out is conn_tell for to_netdev: the packet was told about on its way into the stack. */
static __always_inline enum trace_reason conn_tell_out(struct conn_dir *d, const struct pkt *p, bool orig)
{
	__u32 zero = 0;
	struct runtime *rt = bpf_map_lookup_elem(&lash_runtime, &zero);

	if (!rt || !((p->tcp | REPORT_EVERY | REPORT_FIRST) & rt->report & ~d->seen_out))
		return TRACE_NOT;
	d->seen_out |= p->tcp | REPORT_FIRST;
	return tell_as(d, p, orig);
}

/* event_open reserves an event; there is none when the reader is behind, and then it is counted. */
static __always_inline void *event_open(const __u64 size)
{
	void *e = bpf_ringbuf_reserve(&lash_events, size, 0);
	__u32 zero = 0;
	__u64 *lost;

	if (e)
		return e;
	lost = bpf_map_lookup_elem(&lash_events_lost, &zero);
	if (lost)
		(*lost)++;
	return NULL;
}

/* event_send wakes the reader once for each cfg_events_wake bytes that it is behind, and
 * otherwise leaves it to its timer: no packet pays for a wake-up of its own. */
static __always_inline void event_send(struct event_head *head, const __u64 size, __u16 len)
{
	__u64 unread = bpf_ringbuf_query(&lash_events, BPF_RB_AVAIL_DATA);

	head->time = bpf_ktime_get_ns();
	head->cpu = bpf_get_smp_processor_id();
	head->len = len;
	head->lost = 0;
	bpf_ringbuf_submit(head, unread >= cfg_events_wake && (unread & (cfg_events_wake - 1)) <= size ?
			   BPF_RB_FORCE_WAKEUP : BPF_RB_NO_WAKEUP);
}

static __always_inline void message_fill(struct message *m, __u8 type, __u8 subtype, __u16 source, __u32 hash)
{
	m->type = type;
	m->subtype = subtype;
	m->source = source;
	m->hash = hash;
}

/* capture_size says how much to copy of a packet. */
static __always_inline __u64 capture_size(struct captured *cap, __u64 len, __u16 version)
{
	cap->len_orig = len;
	cap->version = version;
	if (len > CAPTURE_MAX)
		len = CAPTURE_MAX;
	barrier_var(len);
	/* The same length, from 1 to CAPTURE_MAX in terms that a verifier of 6.1 follows. */
	return ((len - 1) & (CAPTURE_MAX - 1)) + 1;
}

/* capture copies the packet's first bytes. How many. */
static __always_inline __u16 capture(struct __sk_buff *skb, struct captured *cap, __u8 *data, __u16 version)
{
	__u64 len = capture_size(cap, skb->len, version);

	if (bpf_skb_load_bytes(skb, 0, data, len))
		len = 0;
	cap->len_cap = len;
	return len;
}

/* who is behind an address: the identity, and the endpoint's number if it is of this node. */
static __always_inline __u32 who(struct scratch *scratch, const struct addr *a, __u16 *id)
{
	struct endpoint *ep = bpf_map_lookup_elem(&lash_endpoints, a);
	struct ipcache_entry *e;

	*id = 0;
	if (ep) {
		*id = ep->id;
		return ep->identity;
	}
	scratch->prefix.prefixlen = 128;
	scratch->prefix.addr = *a;
	e = bpf_map_lookup_elem(&lash_ipcache, &scratch->prefix);
	return e ? e->identity : IDENTITY_WORLD;
}

struct trace_event {
	struct event_head head;
	struct trace_notify msg;
	__u8 data[CAPTURE_MAX];
};

struct drop_event {
	struct event_head head;
	struct drop_notify msg;
	__u8 data[CAPTURE_MAX];
};

struct capture_event {
	struct event_head head;
	struct capture_notify msg;
	__u8 data[CAPTURE_MAX];
};

struct debug_event {
	struct event_head head;
	struct debug_notify msg;
};

/* One line of debugging, in the terms of the field's tools. */
__noinline int debug(struct __sk_buff *skb, __u32 type_source, __u32 arg1, __u32 arg2, __u32 arg3)
{
	struct debug_event *e = event_open(sizeof(*e));

	if (!e)
		return 0;
	message_fill(&e->msg.head, EVENT_DEBUG, type_source >> 16, type_source, skb->hash);
	e->msg.arg1 = arg1;
	e->msg.arg2 = arg2;
	e->msg.arg3 = arg3;
	event_send(&e->head, sizeof(*e), sizeof(e->msg));
	return 0;
}

#define debug_from(skb, type, source, ...) debug(skb, (__u32)(type) << 16 | (source), __VA_ARGS__)

/* What is known of the packet's connection where it is observed. */
enum observe_flags {
	OBSERVE_EGRESS = 1 << 16, /* it comes from a pod of this node */
	OBSERVE_NAT    = 1 << 17, /* its source has been rewritten */
	OBSERVE_TUNNEL = 1 << 18, /* it comes from the tunnel */
};

/* debug_conn says how the connection was found. */
static __always_inline void debug_conn(struct __sk_buff *skb, const struct scratch *scratch, bool egress, __u8 reason, __u32 lifetime)
{
	const struct pkt *p = (const struct pkt *)scratch->pkt;
	__u32 v6 = p->v6 ? DEBUG_CT_LOOKUP6_1 - DEBUG_CT_LOOKUP4_1 : 0;
	__u16 id = egress ? scratch->src_id : scratch->dst_id;

	debug_from(skb, DEBUG_CT_LOOKUP4_1 + v6, id, p->src.w[3], p->dst.w[3],
		   bpf_ntohs(p->sport) | (__u32)bpf_ntohs(p->dport) << 16);
	debug_from(skb, DEBUG_CT_LOOKUP4_2 + v6, id, (__u32)p->proto << 8 | egress, 0, 0);
	if (reason != TRACE_NEW)
		debug_from(skb, DEBUG_CT_MATCH, id, lifetime, 0, 0);
	debug_from(skb, DEBUG_CT_VERDICT, id, reason, 0, 0);
	if (egress)
		debug_from(skb, p->v6 ? DEBUG_IDENTITY6 : DEBUG_IDENTITY4, id, p->dst.w[3], scratch->dst_identity, 0);
	if (reason == TRACE_NEW)
		debug_from(skb, DEBUG_CT_CREATED4 + v6, id, 0, scratch->src_identity, 0);
}

/* debug_packet says how it was decided what becomes of the packet in lash_scratch. */
static __always_inline void debug_packet(struct __sk_buff *skb, struct scratch *scratch, __u32 point, __u32 reason, __u32 lifetime)
{
	struct bpf_tunnel_key *key = (struct bpf_tunnel_key *)scratch->fib;
	__u8 at = point;

	_Static_assert(sizeof(*key) <= sizeof(scratch->fib), "struct bpf_tunnel_key outgrew its place in struct scratch");
	if ((point & OBSERVE_TUNNEL) && (!bpf_skb_get_tunnel_key(skb, key, sizeof(*key), 0) ||
					 !bpf_skb_get_tunnel_key(skb, key, sizeof(*key), BPF_F_TUNINFO_IPV6)))
		debug_from(skb, DEBUG_DECAP, 0, key->tunnel_id, key->tunnel_label, 0);
	if (point & OBSERVE_EGRESS)
		debug_conn(skb, scratch, true, reason, lifetime);
	if (at == TRACE_TO_ENDPOINT) {
		debug_from(skb, DEBUG_LOCAL_DELIVERY, 0, scratch->dst_id, scratch->src_identity, 0);
		if (!(point & OBSERVE_EGRESS))
			debug_conn(skb, scratch, false, reason, lifetime);
	}
	if (at == TRACE_TO_OVERLAY)
		debug_from(skb, DEBUG_ENCAP, scratch->src_id, bpf_ntohl(scratch->node), scratch->src_identity, 0);
}

/* observe tells that the packet in lash_scratch passes a point: enum trace_point, enum
 * observe_flags. Lifetime of its connection in seconds. ifindex: the device it goes to;
 * 0: none, as into the stack. */
__noinline int observe(struct __sk_buff *skb, __u32 point, __u32 ifindex, __u32 reason, __u32 lifetime)
{
	__u32 zero = 0;
	struct runtime *rt = bpf_map_lookup_elem(&lash_runtime, &zero);
	struct scratch *scratch = bpf_map_lookup_elem(&lash_scratch, &zero);
	bool delivered = (__u8)point == TRACE_TO_ENDPOINT;
	struct trace_event *e;
	struct iface *iface;
	struct pkt *p;
	__u16 len;

	if (!rt || !scratch)
		return 0;
	p = (struct pkt *)scratch->pkt;
	scratch->src_identity = who(scratch, &p->src, &scratch->src_id);
	/* A masqueraded packet's destination is told by the device it goes to. */
	iface = delivered ? bpf_map_lookup_elem(&lash_ifaces, &ifindex) : NULL;
	if (iface) {
		scratch->dst_identity = iface->identity;
		scratch->dst_id = iface->id;
	} else {
		scratch->dst_identity = who(scratch, &p->dst, &scratch->dst_id);
	}
	if ((rt->events & EVENTS_DEBUG) && reason < TRACE_UNKNOWN)
		debug_packet(skb, scratch, point, reason, lifetime);
	if (!(rt->events & EVENTS_TRACE))
		return 0;
	e = event_open(sizeof(*e));
	if (!e)
		return 0;
	message_fill(&e->msg.head, EVENT_TRACE, point, delivered ? scratch->dst_id : scratch->src_id, skb->hash);
	e->msg.src_identity = scratch->src_identity;
	e->msg.dst_identity = scratch->dst_identity;
	e->msg.dst_id = delivered ? scratch->dst_id : 0;
	e->msg.reason = reason;
	e->msg.flags = p->v6 ? TRACE_IPV6 : 0;
	e->msg.ifindex = ifindex;
	__builtin_memset(e->msg.orig_ip, 0, sizeof(e->msg.orig_ip));
	/* Where the packet's own source may be another by now. */
	if (delivered || (point & OBSERVE_NAT)) {
		if (p->v6)
			__builtin_memcpy(e->msg.orig_ip, &p->src, 16);
		else
			__builtin_memcpy(e->msg.orig_ip, &p->src.w[3], 4);
	}
	len = capture(skb, &e->msg.cap, e->data, 1);
	event_send(&e->head, sizeof(*e), sizeof(e->msg) + len);
	return 0;
}

/* observe_tunnel is observe for a packet that goes to another node by the tunnel. */
static __always_inline void observe_tunnel(struct __sk_buff *skb, __u32 how, const struct addr *node, __u32 reason, __u32 lifetime)
{
	__u32 zero = 0;
	struct scratch *scratch = bpf_map_lookup_elem(&lash_scratch, &zero);

	if (!scratch)
		return;
	scratch->node = node->w[3];
	observe(skb, how | TRACE_TO_OVERLAY, cfg_overlay_ifindex, reason, lifetime);
}

/* arrived tells where a packet came from, when everything is to be told. */
static __always_inline void arrived(struct __sk_buff *skb, enum trace_point point)
{
	__u32 zero = 0;
	struct runtime *rt = bpf_map_lookup_elem(&lash_runtime, &zero);

	if (rt && (rt->report & REPORT_EVERY) && rt->aggregation == AGGREGATE_NONE)
		observe(skb, point, 0, TRACE_UNKNOWN, 0);
}

/* observe_snat shows a packet before or after masquerading: enum capture_point. */
__noinline int observe_snat(struct __sk_buff *skb, __u32 point, __u32 ifindex)
{
	__u32 zero = 0;
	struct runtime *rt = bpf_map_lookup_elem(&lash_runtime, &zero);
	struct capture_event *e;
	__u16 len;

	if (!rt || !(rt->events & EVENTS_DEBUG))
		return 0;
	e = event_open(sizeof(*e));
	if (!e)
		return 0;
	message_fill(&e->msg.head, EVENT_CAPTURE, point, 0, skb->hash);
	e->msg.arg1 = ifindex;
	e->msg.arg2 = 0;
	len = capture(skb, &e->msg.cap, e->data, 1);
	event_send(&e->head, sizeof(*e), sizeof(e->msg) + len);
	return 0;
}

/* drop_count counts a drop. where: hook, file and line. */
static __always_inline void drop_count(int reason, __u32 where, __u32 bytes)
{
	struct drop_key key = {
		.reason = -reason, .dir = where >> 24, .file = where >> 16, .line = where,
	};
	struct count *c = bpf_map_lookup_elem(&lash_drops, &key);

	if (c) {
		c->packets++;
		c->bytes += bytes;
	} else {
		struct count first = { 1, bytes };

		bpf_map_update_elem(&lash_drops, &key, &first, BPF_ANY);
	}
}

/* drop_event is the event of the drop of the packet in lash_scratch, without the packet's bytes; NULL: nobody listens. */
static __always_inline struct drop_event *drop_event(int reason, __u32 where, __u32 ifindex, __u32 hash)
{
	__u32 zero = 0;
	struct runtime *rt = bpf_map_lookup_elem(&lash_runtime, &zero);
	struct scratch *scratch = bpf_map_lookup_elem(&lash_scratch, &zero);
	struct drop_event *e;
	__u16 src_id, dst_id;
	struct pkt *p;

	if (!rt || !scratch || !(rt->events & EVENTS_DROP))
		return NULL;
	e = event_open(sizeof(*e));
	if (!e)
		return NULL;
	p = (struct pkt *)scratch->pkt;
	e->msg.src_identity = who(scratch, &p->src, &src_id);
	e->msg.dst_identity = who(scratch, &p->dst, &dst_id);
	e->msg.dst_id = dst_id;
	message_fill(&e->msg.head, EVENT_DROP, -reason, src_id, hash);
	e->msg.line = where;
	e->msg.file = where >> 16;
	e->msg.ext_error = 0;
	e->msg.ifindex = ifindex;
	return e;
}

/* count_drop counts the drop of the packet in lash_scratch and tells about it. */
__noinline int count_drop(struct __sk_buff *skb, int reason, __u32 where)
{
	struct drop_event *e;

	drop_count(reason, where, skb->len);
	e = drop_event(reason, where, skb->ifindex, skb->hash);
	if (e) {
		__u16 len = capture(skb, &e->msg.cap, e->data, 1);

		event_send(&e->head, sizeof(*e), sizeof(e->msg) + len);
	}
	return VERDICT_DROP;
}

#define drop(skb, p, hook, reason) \
	count_drop(skb, reason, (__u32)(hook) << 24 | (__u32)(p)->file << 16 | (p)->line)

#undef FILE_ID
#endif
