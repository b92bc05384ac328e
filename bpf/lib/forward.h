/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* Carrying out a decision: rewrite, count, redirect. The fast path is here. */
#ifndef LASH_FORWARD_H
#define LASH_FORWARD_H

#include "event.h"

#define FILE_ID FILE_ROUTE

/* skb->mark of packets that are finished with this node: to_netdev lets them
 * pass unread. The field's value for "SNAT done". */
#define MARK_MASK 0x0f00
#define MARK_DONE 0x0300

/* Where a redirect leads stays readable in skb->cb for program test runs, which
 * send nothing and tell nothing else: cb[0] = ifindex, cb[1] = enum conn_action. */
static __always_inline void note(struct __sk_buff *skb, __u32 ifindex, __u32 action)
{
	skb->cb[0] = ifindex;
	skb->cb[1] = action;
}

/* What a hop changes in the frame's first HEADERS4 bytes. macs: both, as a decision has them and a frame begins. */
static __always_inline void hop_macs(void *data, const struct addr *macs)
{
	_Static_assert(offsetof(struct conn_dir, dmac) == offsetof(struct conn_dir, node) &&
		       offsetof(struct conn_dir, smac) == offsetof(struct conn_dir, node) + ETH_ALEN, "they are copied as one");
	*(word64 *)data = *(const word64 *)macs;
	*(word32 *)(data + 8) = *(const word32 *)&macs->w[2];
}

static __always_inline void hop_ttl(void *data, bool v6)
{
	if (v6) {
		((struct ipv6hdr *)(data + ETH_HLEN))->hop_limit--;
	} else {
		struct iphdr *ip = data + ETH_HLEN;
		__u32 sum = (__u32)ip->check + bpf_htons(0x0100);

		ip->ttl--;
		ip->check = (__u16)(sum + (sum >= 0xffff));
	}
}

static __always_inline int write_hop(struct __sk_buff *skb, const struct pkt *p, const struct addr *macs, bool ttl)
{
	void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;

	if (data + HEADERS4 > end)
		return -1;
	hop_macs(data, macs);
	if (!ttl)
		return 0;
	hop_ttl(data, p->v6);
	/* No checksum of IPv6 makes up for it: where the device has summed the packet, its sum follows. */
	if (p->v6)
		bpf_csum_update(skb, ~(__u32)bpf_htons(1));
	return 0;
}

static __always_inline int to_pod(struct __sk_buff *skb, const enum hook hook, __u32 ifindex)
{
	note(skb, ifindex, ACTION_PEER);
	/* redirect_peer exists at ingress only, and from 5.10 on. */
	if (hook != HOOK_HOST && cfg_host_routing)
		return bpf_redirect_peer(ifindex, 0);
	return bpf_redirect(ifindex, 0);
}

/* Up the host's stack by way of lash_host: the reverse path of a pod's address is
 * that device, so that even strict rp_filter agrees. */
static __always_inline int to_host(struct __sk_buff *skb, const struct pkt *p)
{
	__u64 mac = cfg_host_mac;
	struct addr macs = {};

	__builtin_memcpy(macs.b, &mac, ETH_ALEN);
	__builtin_memcpy(macs.b + ETH_ALEN, &mac, ETH_ALEN);
	if (write_hop(skb, p, &macs, false))
		return -1;
	note(skb, cfg_host_ifindex, ACTION_HOST);
	return bpf_redirect(cfg_host_ifindex, BPF_F_INGRESS);
}

/* to_tunnel encapsulates. The inner frame stays as the sender made it: the receiving
 * node decrements its TTL and writes its MAC addresses, once, when it delivers. */
static __noinline int to_tunnel(struct __sk_buff *skb, const struct addr *node, __u32 vni)
{
	struct bpf_tunnel_key key = { .tunnel_id = vni, .tunnel_ttl = 64 };
	__u64 flags = BPF_F_ZERO_CSUM_TX;

	if (addr_is4(node)) {
		key.remote_ipv4 = bpf_ntohl(node->w[3]);
	} else {
		__builtin_memcpy(key.remote_ipv6, node, sizeof(key.remote_ipv6));
		flags = BPF_F_TUNINFO_IPV6;
	}
	if (bpf_skb_set_tunnel_key(skb, &key, sizeof(key), flags))
		return -1;
	note(skb, cfg_overlay_ifindex, ACTION_TUNNEL);
	skb->mark = (skb->mark & ~MARK_MASK) | MARK_DONE;
	return bpf_redirect(cfg_overlay_ifindex, 0);
}

/* tunnel_sender: the outer source address and the VNI of a packet from the tunnel. */
static __always_inline int tunnel_sender(struct __sk_buff *skb, struct addr *node, __u32 *vni)
{
	struct bpf_tunnel_key key = {};

	if (!bpf_skb_get_tunnel_key(skb, &key, sizeof(key), 0))
		addr_from4(node, bpf_htonl(key.remote_ipv4));
	else if (!bpf_skb_get_tunnel_key(skb, &key, sizeof(key), BPF_F_TUNINFO_IPV6))
		__builtin_memcpy(node, key.remote_ipv6, sizeof(*node));
	else
		return -1;
	*vni = key.tunnel_id;
	return 0;
}

/* sent_by: the packet from the tunnel comes from the node that the other direction leads to; where that
 * leads to a client outside, from any node. */
static __noinline bool sent_by(struct __sk_buff *skb, struct conn *c, bool orig)
{
	const struct conn_dir *back = orig ? &c->reply : &c->orig;
	struct ipcache_entry *e;
	struct addr node;
	__u32 vni;

	if (tunnel_sender(skb, &node, &vni))
		return false;
	if (c->flags & CONN_DSR) {
		e = ipcache_of(&node);
		return e && (e->flags & IPCACHE_PEER);
	}
	return back->action == ACTION_TUNNEL && addr_equal(&node, &back->node);
}

/* carry_out rewrites and sends a packet as decided, and tells about it as conn_tell found:
 * TRACE_NOT, or a packet that is in lash_scratch. Negative: the packet could not be written. */
static __always_inline int carry_out(struct __sk_buff *skb, struct pkt *p, const enum hook hook,
				     struct conn *c, const struct conn_dir *d, struct conn_key *k,
				     enum trace_reason tell)
{
	__u32 out = d->out_ifindex, lifetime = 0, how = hook == HOOK_POD ? OBSERVE_EGRESS : hook == HOOK_OVERLAY ? OBSERVE_TUNNEL : 0;
	__u8 action = d->action, flags = d->flags;

	if (tell != TRACE_NOT)
		lifetime = c->expires / cfg_hz;
	if (unlikely(flags & (DIR_TO_NAT | DIR_NO_NAT | DIR_DSR))) {
		if (tell != TRACE_NOT)
			observe_snat(skb, CAPTURE_SNAT_PRE, out);
		/* This may move the packet; what follows reads it anew. */
		if (nat_apply(skb, p, c, k, flags))
			return -1;
		if (tell != TRACE_NOT)
			observe_snat(skb, CAPTURE_SNAT_POST, out);
		if (flags & DIR_TO_NAT)
			how |= OBSERVE_NAT;
	}
	if (likely(action == ACTION_PEER || action == ACTION_EGRESS)) {
		if (write_hop(skb, p, &d->node, flags & DIR_TTL))
			return -1;
		if (tell != TRACE_NOT)
			observe(skb, how | (action == ACTION_PEER ? TRACE_TO_ENDPOINT : TRACE_TO_NETWORK), out, tell, lifetime);
		if (action == ACTION_PEER)
			return to_pod(skb, hook, out);
		note(skb, out, ACTION_EGRESS);
		skb->mark = (skb->mark & ~MARK_MASK) | MARK_DONE;
		return bpf_redirect(out, 0);
	}
	if (action == ACTION_TUNNEL) {
		if (tell != TRACE_NOT)
			observe_tunnel(skb, how, &d->node, tell, lifetime);
		return to_tunnel(skb, &d->node, d->vni);
	}
	if (tell != TRACE_NOT)
		observe(skb, how | TRACE_TO_STACK, 0, tell, lifetime);
	if (action == ACTION_HOST)
		return to_host(skb, p);
	note(skb, 0, ACTION_PASS);
	return VERDICT_OK;
}

/* too_big: the packet, or a segment of it, exceeds the route's MTU. */
static __always_inline bool too_big(const struct __sk_buff *skb, const struct pkt *p, __u16 mtu)
{
	if (likely(skb->len - ETH_HLEN <= mtu))
		return false;
	if (!skb->gso_size)
		return true;
	return skb->gso_size + (p->l4 - ETH_HLEN) + (p->proto == IPPROTO_TCP ? p->tcp_len : 8) > mtu;
}

/* Each program is two functions: the first parses a packet and follows the decision of its
 * connection, if one holds; otherwise it leaves the packet, and why, in lash_scratch and
 * returns NOT_FAST. Its stack is free again for the second, which decides. */
#define NOT_FAST (-2)

/* followed is the decision that holds for a packet. */
struct followed {
	struct conn *c;
	struct conn_dir *d;
	const struct runtime *rt;
	__u32 now;
	bool orig;
};

/* conn_follow finds the decision that the packet's connection has for it, under key k, and which holds for a packet
 * that arrives at in. answers: it is likely the answer to a translated connection, to be found by its translated tuple.
 * SLOW_NOT, or the reason why there is none. */
static __always_inline enum slow_reason conn_follow(const struct pkt *p, struct conn_key *k, __u32 in, bool answers, struct followed *f)
{
	__u32 zero = 0;
	bool from_hi;

	if (unlikely(p->flags & (PKT_FRAGMENT | PKT_ICMP_ERROR | PKT_EXTENSION)))
		return p->flags & PKT_FRAGMENT ? SLOW_FRAGMENT : p->flags & PKT_ICMP_ERROR ? SLOW_ICMP_ERROR : SLOW_EXTENSION;
	from_hi = pkt_key(k, p);
	f->orig = false;
	if (answers) {
		f->c = conn_answered(k, p);
		if (likely(f->c))
			goto found;
		pkt_key(k, p);
	}
	f->c = bpf_map_lookup_elem(&lash_conn, k);
	if (likely(f->c)) {
		f->orig = conn_from_initiator(f->c, from_hi);
	} else {
		f->c = answers ? NULL : conn_if_answered(k, p);
		if (!f->c)
			return SLOW_NEW;
	}
found:
	f->d = f->orig ? &f->c->orig : &f->c->reply;
	f->rt = bpf_map_lookup_elem(&lash_runtime, &zero);
	if (unlikely(!f->rt || f->d->epoch != f->rt->epoch))
		return f->d->epoch ? SLOW_EPOCH : SLOW_UNDECIDED;
	if (unlikely(f->d->in != in))
		return SLOW_ELSEWHERE;
	f->now = ticks();
	if (unlikely(past(f->now, f->d->deadline) || past(f->now, f->c->expires)))
		return SLOW_DEADLINE;
	/* A SYN opens the connection anew, or takes along which frontend it is for. */
	if (unlikely(tcp_opens(p) && (conn_closed(f->c) || (f->c->flags & CONN_DSR))))
		return SLOW_REOPENED;
	if (unlikely(p->ttl <= 1 && (f->d->flags & DIR_TTL)))
		return SLOW_TTL;
	return SLOW_NOT;
}

/* conn_go does what conn_follow has found for the packet. The verdict or a drop reason. */
static __always_inline int conn_go(struct __sk_buff *skb, struct pkt *p, const enum hook hook, struct conn_key *k, const struct followed *f)
{
	int verdict;

	conn_see(f->c, f->d, p, f->orig, skb->len, f->now);
	verdict = carry_out(skb, p, hook, f->c, f->d, k, TRACE_NOT);
	if (unlikely(verdict == -1))
		return DROP(p, DROP_WRITE);
	count(hook, SLOW_NOT, skb->len);
	return verdict;
}

/* conn_fast follows the connection's decision for this packet, if one holds.
 * The verdict, or NOT_FAST with the reason in *why. */
static __always_inline int conn_fast(struct __sk_buff *skb, struct pkt *p, const enum hook hook,
				     __u32 in, bool answers, enum slow_reason *why)
{
	struct conn_key k;
	struct followed f;

	*why = conn_follow(p, &k, in, answers, &f);
	if (unlikely(*why != SLOW_NOT))
		return NOT_FAST;
	if (hook == HOOK_OVERLAY && unlikely(!sent_by(skb, f.c, f.orig))) {
		*why = SLOW_ELSEWHERE;
		return NOT_FAST;
	}
	if (unlikely(f.d->mtu && too_big(skb, p, f.d->mtu))) {
		*why = SLOW_MTU;
		return NOT_FAST;
	}
	if (unlikely(conn_due(f.rt, f.d, p, f.now))) {
		*why = SLOW_REPORT;
		return NOT_FAST;
	}
	return conn_go(skb, p, hook, &k, &f);
}

/* finish ends a program's first half: the verdict, unless the packet is the second's or dropped, which it leaves in lash_scratch. */
static __always_inline int finish(struct __sk_buff *skb, const struct pkt *p, const enum hook hook, int verdict, enum slow_reason why)
{
	if (likely(verdict > NOT_FAST))
		return verdict;
	slow_pkt(p, why);
	return verdict == NOT_FAST ? NOT_FAST : drop(skb, p, hook, verdict);
}

/* conn_report follows the decision that conn_fast found, for a packet that is worth an
 * event. NOT_FAST: it has gone meanwhile. */
static __noinline int conn_report(struct __sk_buff *skb, struct pkt *p, const enum hook hook)
{
	__u32 zero = 0;
	struct scratch *scratch = bpf_map_lookup_elem(&lash_scratch, &zero);
	struct conn_dir *d;
	struct conn *c;
	bool from_hi, orig;
	int verdict;

	if (!scratch)
		return NOT_FAST;
	from_hi = pkt_key(&scratch->key, p);
	c = bpf_map_lookup_elem(&lash_conn, &scratch->key);
	orig = c && conn_from_initiator(c, from_hi);
	if (!c)
		c = conn_if_answered(&scratch->key, p);
	if (!c)
		return NOT_FAST;
	d = orig ? &c->orig : &c->reply;
	conn_see(c, d, p, orig, skb->len, ticks());
	count(hook, SLOW_REPORT, skb->len);
	verdict = carry_out(skb, p, hook, c, d, &scratch->key, conn_tell(d, p, orig));
	return verdict == -1 ? DROP(p, DROP_WRITE) : verdict;
}

#undef FILE_ID
#endif
