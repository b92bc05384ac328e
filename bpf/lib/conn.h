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
	__be16 lo_port, hi_port;
	word64 *last = (void *)k + offsetof(struct conn_key, lo_port);
	bool swap;

	_Static_assert(sizeof(*k) == offsetof(struct conn_key, lo_port) + sizeof(*last), "the key's last word is written as one");
	_Static_assert(KEY_TUPLE == 0 && offsetof(struct conn_key, proto) == offsetof(struct conn_key, lo_port) + 4, "the same");
	if (src->d[1] != dst->d[1])
		swap = src->d[1] > dst->d[1];
	else if (src->d[0] != dst->d[0])
		swap = src->d[0] > dst->d[0];
	else
		swap = sport > dport;
	if (swap) {
		k->lo = *dst;
		k->hi = *src;
		lo_port = dport;
		hi_port = sport;
	} else {
		k->lo = *src;
		k->hi = *dst;
		lo_port = sport;
		hi_port = dport;
	}
	*last = bpf_words(bpf_halfwords(lo_port, hi_port), bpf_htonl((__u32)proto << 24));
	return swap;
}

static __always_inline bool conn_key_equal(const struct conn_key *a, const struct conn_key *b)
{
	return addr_equal(&a->lo, &b->lo) && addr_equal(&a->hi, &b->hi) && a->lo_port == b->lo_port &&
	       a->hi_port == b->hi_port && a->proto == b->proto && a->kind == b->kind;
}

static __always_inline bool pkt_key(struct conn_key *k, const struct pkt *p)
{
	return conn_key(k, &p->src, p->sport, &p->dst, p->dport, p->proto);
}

static __always_inline bool conn_from_initiator(const struct conn *c, bool from_hi)
{
	return from_hi == !!(c->flags & CONN_INITIATOR_HI);
}

/* The ends of a connection, by its record's key. */
static __always_inline const struct addr *conn_initiator(const struct conn *c, const struct conn_key *k, __be16 *port)
{
	bool hi = c->flags & CONN_INITIATOR_HI;

	*port = hi ? k->hi_port : k->lo_port;
	return hi ? &k->hi : &k->lo;
}

static __always_inline const struct addr *conn_responder(const struct conn *c, const struct conn_key *k, __be16 *port)
{
	bool hi = c->flags & CONN_INITIATOR_HI;

	*port = hi ? k->lo_port : k->hi_port;
	return hi ? &k->lo : &k->hi;
}

/* conn_translated fills the key of the tuple that the connection has beyond its translation. */
static __always_inline void conn_translated(struct conn_key *t, const struct conn *c, const struct conn_key *k)
{
	__be16 from_port, to_port;
	const struct addr *from = conn_initiator(c, k, &from_port), *to = conn_responder(c, k, &to_port);

	if (c->flags & CONN_NAT) {
		from = &c->nat_addr;
		from_port = c->nat_port;
	}
	if (c->flags & CONN_DNAT) {
		to = &c->to_addr;
		to_port = c->to_port;
	}
	conn_key(t, from, from_port, to, to_port, k->proto);
}

static __always_inline __u32 conn_lifetime(const struct conn *c, __u8 proto)
{
	if (proto != IPPROTO_TCP)
		return cfg_ct_any_ticks;
	if ((c->state & STATE_CLOSED) || (c->state & STATE_FIN_BOTH) == STATE_FIN_BOTH)
		return cfg_ct_close_ticks;
	if (!(c->state & STATE_REPLIED))
		return cfg_ct_syn_ticks;
	if ((c->flags & CONN_DSR) && (c->state & STATE_FIN_BOTH))
		return cfg_ct_syn_ticks; /* the other side's does not come by here */
	return cfg_ct_tcp_ticks;
}

/* conn_turn takes note of a TCP packet that opens or ends the connection, or comes while it does. The connection's lifetime. */
static __noinline __u32 conn_turn(struct conn *c, const struct pkt *p, bool orig, __u32 now)
{
	if (!(c->state & STATE_REPLIED) && (!orig || ((c->flags & CONN_DSR) && (p->tcp & TCP_ACK))))
		c->state |= STATE_REPLIED;
	/* Who goes on a second after its RST has not meant this connection, but one before with the same ports. */
	if ((c->state & STATE_CLOSED) && !(p->tcp & TCP_RST) && orig == !(c->state & STATE_RST_REPLY) &&
	    past(now + cfg_ct_close_ticks, c->expires + cfg_hz))
		c->state &= ~(STATE_CLOSED | STATE_RST_REPLY);
	if (p->tcp & (TCP_FIN | TCP_RST)) {
		if (!(p->tcp & TCP_RST))
			c->state |= orig ? STATE_FIN_ORIG : STATE_FIN_REPLY;
		else if (!(c->state & STATE_CLOSED))
			c->state |= orig ? STATE_CLOSED : STATE_CLOSED | STATE_RST_REPLY;
	}
	return conn_lifetime(c, IPPROTO_TCP);
}

/* conn_see takes note of a packet: state, lifetime, counters. What both directions share is written only where it
 * changes: they may be on two CPUs. */
static __always_inline void conn_see(struct conn *c, struct conn_dir *d, const struct pkt *p,
				     bool orig, __u32 len, __u32 now)
{
	__u32 expires = now;

	if (p->proto != IPPROTO_TCP) {
		if (!orig && !(c->state & STATE_REPLIED))
			c->state |= STATE_REPLIED;
		expires += cfg_ct_any_ticks;
	} else if (likely(c->state == STATE_REPLIED && !(p->tcp & (TCP_FIN | TCP_RST)))) {
		expires += cfg_ct_tcp_ticks;
	} else {
		expires += conn_turn(c, p, orig, now);
	}
	if (c->expires != expires)
		c->expires = expires;
	d->packets++;
	d->bytes += len;
}

/* tcp_opens: a connection's first packet, and not one that ends it in the same breath. */
static __always_inline bool tcp_opens(const struct pkt *p)
{
	return (p->tcp & (TCP_SYN | TCP_ACK | TCP_RST | TCP_FIN)) == TCP_SYN;
}

/* conn_closed: what is left of the connection does not bind a new SYN. Of one whose backend answers by itself
 * only the client's end is seen where it came in. */
static __always_inline bool conn_closed(const struct conn *c)
{
	if ((c->flags & CONN_DSR) && (c->state & STATE_FIN_BOTH))
		return true;
	return (c->state & STATE_CLOSED) || (c->state & STATE_FIN_BOTH) == STATE_FIN_BOTH;
}

/* conn_answered finds the record of a translated connection that the packet is the answer to: it
 * comes from the responder as translation knows it. k is the packet's key and becomes the record's. */
static __always_inline struct conn *conn_answered(struct conn_key *k, const struct pkt *p)
{
	struct conn_key *owner = bpf_map_lookup_elem(&lash_nat, k);
	const struct addr *from;
	struct conn *c;
	__be16 port;

	if (!owner)
		return NULL;
	*k = *owner;
	c = bpf_map_lookup_elem(&lash_conn, k);
	if (!c)
		return NULL;
	from = &c->to_addr;
	port = c->to_port;
	if (!(c->flags & CONN_DNAT))
		from = conn_responder(c, k, &port);
	return addr_equal(from, &p->src) && port == p->sport ? c : NULL;
}

/* conn_if_answered is conn_answered where few packets are. */
static __noinline struct conn *conn_if_answered(struct conn_key *k, const struct pkt *p)
{
	return conn_answered(k, p);
}

/* nat_lock makes sure that the row of lash_nat of scratch->nat_key that is looked at is the one that is
 * removed. False: somebody else is at it. */
static __always_inline bool nat_lock(struct scratch *scratch)
{
	scratch->lock = scratch->nat_key;
	scratch->lock.kind = KEY_LOCK;
	return !bpf_map_update_elem(&lash_nat, &scratch->lock, &scratch->lock, BPF_NOEXIST);
}

static __always_inline void nat_unlock(struct scratch *scratch)
{
	bpf_map_delete_elem(&lash_nat, &scratch->lock);
}

/* conn_fresh makes scratch->conn the record of a connection that the packet opens, in which nothing is decided. */
static __always_inline struct conn *conn_fresh(struct scratch *scratch, const struct pkt *p, bool from_hi)
{
	struct conn *c = &scratch->conn;
	__u32 now = ticks();

	__builtin_memset(c, 0, sizeof(*c));
	c->flags = from_hi ? CONN_INITIATOR_HI : 0;
	c->created = now;
	c->expires = now + conn_lifetime(c, p->proto);
	c->orig.due = c->reply.due = now + FOREVER;
	return c;
}

/* conn_put makes scratch->conn the record of scratch->key; one that is closed or expired gives way. It must be complete
 * as far as translation goes: from here on other CPUs follow it. 0; 1: there is one already, or was a moment later than
 * the packet's first search, and that one holds; or a drop reason: the map is full.
 * (Before 6.2 the verifier takes no argument of a global function for a map's key or value.) */
__noinline int conn_put(struct pkt *p)
{
	__u32 now = ticks(), zero = 0;
	struct scratch *scratch = bpf_map_lookup_elem(&lash_scratch, &zero);
	struct conn_key *k;
	struct conn *c;
	long err = -EEXIST;

	if (!p || !scratch)
		return -DROP_CT_INSERT;
	k = &scratch->key;
	if (scratch->why == SLOW_NEW)
		err = bpf_map_update_elem(&lash_conn, k, &scratch->conn, BPF_NOEXIST);
	if (likely(err != -EEXIST))
		return err ? DROP(p, DROP_CT_INSERT) : 0;
	c = bpf_map_lookup_elem(&lash_conn, k);
	if (c && !past(now, c->expires) && !(tcp_opens(p) && conn_closed(c)))
		return 1;
	/* Its translation goes with it, unless the tuple is another connection's by now. */
	if (c && (c->flags & (CONN_NAT | CONN_DNAT))) {
		struct conn_key *owner;

		conn_translated(&scratch->nat_key, c, k);
		if (nat_lock(scratch)) {
			owner = bpf_map_lookup_elem(&lash_nat, &scratch->nat_key);
			if (owner && conn_key_equal(owner, k))
				bpf_map_delete_elem(&lash_nat, &scratch->nat_key);
			nat_unlock(scratch);
		}
	}
	return bpf_map_update_elem(&lash_conn, k, &scratch->conn, BPF_ANY) ? DROP(p, DROP_CT_INSERT) : 0;
}

/* conn_open finds the record of scratch->key, or makes one in which nothing is decided. 0 or a drop reason. */
static __always_inline int conn_open(struct pkt *p, struct scratch *scratch, bool from_hi)
{
	int err;

	conn_fresh(scratch, p, from_hi);
	err = conn_put(p);
	return err < 0 ? err : 0;
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
