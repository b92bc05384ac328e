/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* The connection record: key, creation, TCP state, lifetime. */
#ifndef LASH_CONN_H
#define LASH_CONN_H

#include "parse.h"

#define FILE_ID FILE_CONN

#define FOREVER (1u << 30)

static __always_inline __u32 ticks(void)
{
	return (__u32)bpf_jiffies64();
}

static __always_inline bool past(__u32 now, __u32 when)
{
	return (__s32)(now - when) > 0;
}

static __always_inline __u32 current_epoch(void)
{
	__u32 zero = 0;
	struct runtime *rt = bpf_map_lookup_elem(&lash_runtime, &zero);

	return rt ? rt->epoch : 0;
}

/* conn_key fills the normalised key; true: the packet's source is its hi side. */
static __always_inline bool conn_key(struct conn_key *k, const struct addr *src, __be16 sport,
				     const struct addr *dst, __be16 dport, __u8 proto)
{
	bool swap;

	if (src->d[1] != dst->d[1])
		swap = src->d[1] > dst->d[1];
	else if (src->d[0] != dst->d[0])
		swap = src->d[0] > dst->d[0];
	else
		swap = sport > dport;
	if (swap) {
		k->lo = *dst;
		k->hi = *src;
		k->lo_port = dport;
		k->hi_port = sport;
	} else {
		k->lo = *src;
		k->hi = *dst;
		k->lo_port = sport;
		k->hi_port = dport;
	}
	k->proto = proto;
	__builtin_memset(k->pad, 0, sizeof(k->pad));
	return swap;
}

static __always_inline bool conn_key_equal(const struct conn_key *a, const struct conn_key *b)
{
	return addr_equal(&a->lo, &b->lo) && addr_equal(&a->hi, &b->hi) && a->lo_port == b->lo_port &&
	       a->hi_port == b->hi_port && a->proto == b->proto;
}

static __always_inline bool pkt_key(struct conn_key *k, const struct pkt *p)
{
	return conn_key(k, &p->src, p->sport, &p->dst, p->dport, p->proto);
}

static __always_inline bool conn_from_initiator(const struct conn *c, bool from_hi)
{
	return from_hi == !!(c->flags & CONN_INITIATOR_HI);
}

static __always_inline __u32 conn_lifetime(const struct conn *c, __u8 proto)
{
	if (proto != IPPROTO_TCP)
		return cfg_ct_any_ticks;
	if ((c->state & STATE_CLOSED) || (c->state & STATE_FIN_BOTH) == STATE_FIN_BOTH)
		return cfg_ct_close_ticks;
	if (!(c->state & STATE_REPLIED))
		return cfg_ct_syn_ticks;
	return cfg_ct_tcp_ticks;
}

/* conn_see takes note of a packet: state, lifetime, counters. */
static __always_inline void conn_see(struct conn *c, struct conn_dir *d, const struct pkt *p,
				     bool orig, __u32 len, __u32 now)
{
	if (!orig && !(c->state & STATE_REPLIED))
		c->state |= STATE_REPLIED;
	if (unlikely(p->tcp & (TCP_FIN | TCP_RST))) {
		if (p->tcp & TCP_RST)
			c->state |= STATE_CLOSED;
		else
			c->state |= orig ? STATE_FIN_ORIG : STATE_FIN_REPLY;
	}
	c->expires = now + conn_lifetime(c, p->proto);
	d->packets++;
	d->bytes += len;
}

/* tcp_opens: a connection's first packet, and not one that ends it in the same breath. */
static __always_inline bool tcp_opens(const struct pkt *p)
{
	return (p->tcp & (TCP_SYN | TCP_ACK | TCP_RST | TCP_FIN)) == TCP_SYN;
}

/* conn_closed: what is left of the connection does not bind a new SYN. */
static __always_inline bool conn_closed(const struct conn *c)
{
	return (c->state & STATE_CLOSED) || (c->state & STATE_FIN_BOTH) == STATE_FIN_BOTH;
}

/* conn_open finds the packet's record or makes one, in which nothing is decided.
 * A closed or expired record is made anew. NULL and *err: the map is full. */
static __always_inline struct conn *conn_open(struct __sk_buff *skb, struct pkt *p,
					      struct conn_key *k, bool from_hi, int *err)
{
	struct conn *c = bpf_map_lookup_elem(&lash_conn, k);
	__u32 now = ticks(), zero = 0;
	struct scratch *scratch;
	struct conn *fresh;

	if (c) {
		if (!past(now, c->expires) && !(tcp_opens(p) && conn_closed(c)))
			return c;
	}
	scratch = bpf_map_lookup_elem(&lash_scratch, &zero);
	if (!scratch) {
		*err = DROP(p, DROP_CT_INSERT);
		return NULL;
	}
	/* Its masquerading goes with it, unless the source port is another connection's by now. */
	if (c && (c->flags & CONN_NAT)) {
		struct conn_key *nk = &scratch->nat_key, *owner;

		if (c->flags & CONN_INITIATOR_HI)
			conn_key(nk, &c->nat_addr, c->nat_port, &k->lo, k->lo_port, k->proto);
		else
			conn_key(nk, &c->nat_addr, c->nat_port, &k->hi, k->hi_port, k->proto);
		owner = bpf_map_lookup_elem(&lash_nat, nk);
		if (owner && conn_key_equal(owner, k))
			bpf_map_delete_elem(&lash_nat, nk);
	}
	fresh = &scratch->conn;
	__builtin_memset(fresh, 0, sizeof(*fresh));
	fresh->flags = from_hi ? CONN_INITIATOR_HI : 0;
	fresh->created = now;
	fresh->expires = now + conn_lifetime(fresh, p->proto);
	fresh->orig.due = fresh->reply.due = now + FOREVER;
	if (bpf_map_update_elem(&lash_conn, k, fresh, BPF_ANY)) {
		*err = DROP(p, DROP_CT_INSERT);
		return NULL;
	}
	c = bpf_map_lookup_elem(&lash_conn, k);
	if (!c)
		*err = DROP(p, DROP_CT_INSERT);
	return c;
}

/* A decision is published by its epoch: cleared first, set last, so that the
 * fast path on another CPU never follows half of one. */
static __always_inline void dir_publish(struct conn_dir *d, const struct conn_dir *decided, __u32 epoch)
{
	*(volatile __u32 *)&d->epoch = 0;
	barrier();
	d->deadline = decided->deadline;
	d->in = decided->in;
	d->out_ifindex = decided->out_ifindex;
	d->action = decided->action;
	d->flags = decided->flags;
	d->mtu = decided->mtu;
	d->vni = decided->vni;
	d->node = decided->node; /* or the MAC addresses */
	barrier();
	*(volatile __u32 *)&d->epoch = epoch;
}

#undef FILE_ID
#endif
