//go:build ignore

/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* lash_host, egress: what the node's own processes (and, with legacy host routing, the
 * node's stack) send to the pods of this node, in tunnel mode to those of others, and to
 * services' addresses, which are routed here for what no socket program translates. */
#include "lib/lb.h"

#define FILE_ID FILE_HOST

/* to_backend decides the way of a packet from here to its service's backend, and in *nat the address that it goes from,
 * to which the answer comes back here. enum conn_action, or a drop reason. */
static __always_inline int to_backend(struct __sk_buff *skb, struct pkt *p, struct scratch *scratch, struct conn *c, struct addr *nat)
{
	struct conn_dir *forth = &scratch->conn.orig;
	struct hop *hop = (struct hop *)scratch->plan;
	struct endpoint *ep = endpoint_of(&p->dst);
	struct ipcache_entry *remote;
	struct device *dev;
	__be16 port;
	int action;

	*nat = p->v6 ? ROUTER6 : ROUTER4;
	if (ep && (ep->flags & ENDPOINT_HOST)) {
		/* The node is its own backend, or refuses. What comes in by a device from its own address it would take for a
		 * forgery; the frontend's is nobody's, and routed to that device. */
		*nat = *conn_responder(c, &scratch->key, &port);
		decide_stack(forth, IN_HOST, ACTION_HOST, FOREVER);
		return ACTION_HOST;
	}
	if (ep) {
		decide_pod(forth, IN_HOST, ep, 0);
		return ACTION_PEER;
	}
	remote = tunnel_to(&p->dst);
	if (remote) {
		decide_tunnel(forth, IN_HOST, &remote->node, IDENTITY_HOST);
		return ACTION_TUNNEL;
	}
	if (p->ttl <= 1)
		return DROP(p, DROP_TTL);
	action = route(skb, p, false, hop, &scratch->tell);
	if (action < 0)
		return action;
	dev = bpf_map_lookup_elem(&lash_devices, &hop->ifindex);
	if (action == ACTION_HOST || !dev)
		return DROP(p, DROP_UNROUTABLE);
	*nat = p->v6 ? dev->ip6 : dev->ip4;
	decide_egress(forth, IN_HOST, hop, 0);
	return action;
}

/* from_host_service serves the node as a client of services, packet by packet: ping, SCTP, raw sockets, those that were
 * there before the service, ports that nobody serves. And it leads answers of the node as its own backend back to it.
 * What the node forwards for others comes from outside. */
static __noinline int from_host_service(struct __sk_buff *skb, struct pkt *p, __u32 why)
{
	__u32 zero = 0;
	struct scratch *scratch = bpf_map_lookup_elem(&lash_scratch, &zero);
	struct conn_dir *forth, *d;
	struct endpoint *src;
	enum trace_reason tell;
	struct addr nat;
	struct conn *c;
	bool orig, own;
	int action = ACTION_HOST, met, err;

	if (!scratch)
		return DROP(p, DROP_CT_INSERT);
	err = whole_tuple(skb, p, false);
	if (err)
		return err;
	if (p->flags & PKT_ICMP_ERROR) {
		if (!(p->flags & PKT_TRANSLATED))
			return DROP(p, DROP_UNROUTABLE);
		count(HOOK_HOST, SLOW_ICMP_ERROR, skb->len);
		action = to_host(skb, p);
		return action == -1 ? DROP(p, DROP_WRITE) : action;
	}
	src = endpoint_of(&p->src);
	own = src && (src->flags & ENDPOINT_HOST);
	met = conn_meet(skb, own ? MEET_INSIDE : MEET_OUTSIDE);
	if (met < 0)
		return met;
	c = met == MET_NOTHING ? NULL : bpf_map_lookup_elem(&lash_conn, &scratch->key);
	if (!c || !(c->flags & CONN_DNAT))
		return DROP(p, DROP_UNROUTABLE);
	orig = met == MET_ORIG;
	forth = &scratch->conn.orig; /* free again: conn_meet has copied it */
	__builtin_memset(forth, 0, sizeof(*forth));
	if (orig) {
		action = to_backend(skb, p, scratch, c, &nat);
		if (action < 0)
			return action;
		if (own)
			c->flags |= CONN_HOST;
		err = lb_claim(skb, p, c, &nat);
		if (err)
			return err;
	} else {
		decide_stack(forth, IN_HOST, ACTION_HOST, FOREVER);
	}
	forth->flags |= nat_flags(c, orig);
	d = orig ? &c->orig : &c->reply;
	conn_see(c, d, p, orig, skb->len, ticks());
	count(HOOK_HOST, action == ACTION_NEIGH ? SLOW_NEIGHBOUR : c->service ? why : p->flags & PKT_ECHO ? SLOW_ECHO : SLOW_REFUSED, skb->len);
	tell = conn_tell(d, p, orig);
	if (action != ACTION_NEIGH)
		dir_publish(d, forth, current_epoch());
	/* A neighbour is found by the packet, and checked by one each time the route is. */
	if (action == ACTION_NEIGH || (action == ACTION_EGRESS && why == SLOW_DEADLINE)) {
		struct hop *hop = (struct hop *)scratch->plan;

		if (nat_apply(skb, p, c, &scratch->key, DIR_TO_NAT))
			return DROP(p, DROP_WRITE);
		if (tell != TRACE_NOT)
			observe(skb, TRACE_TO_NETWORK | OBSERVE_NAT, hop->ifindex, tell, c->expires / cfg_hz);
		action = by_neighbour(skb, p, hop);
	} else {
		action = carry_out(skb, p, HOOK_HOST, c, forth, &scratch->key, tell);
	}
	return action == -1 ? DROP(p, DROP_WRITE) : action;
}

/* A packet to a pod. NOT_FAST: it is to none. */
static __noinline int from_host_slow(struct __sk_buff *skb, struct pkt *p, __u32 why)
{
	__u32 epoch = current_epoch(), zero = 0;
	struct scratch *scratch = bpf_map_lookup_elem(&lash_scratch, &zero);
	struct conn_dir *forth, *back, *d, *other;
	struct ipcache_entry *remote = NULL;
	struct endpoint *ep, *src;
	struct conn *c;
	bool orig;
	int action, met, err;

	if (!scratch)
		return DROP(p, DROP_CT_INSERT);
	ep = endpoint_of(&p->dst);
	if (!ep)
		remote = tunnel_to(&p->dst);
	if (!remote && (!ep || (ep->flags & ENDPOINT_HOST))) {
		/* The kernel's own multicast (listener reports, solicitations) has no listener here. */
		if (p->v6 ? p->dst.b[0] == 0xff : (p->dst.b[12] & 0xf0) == 0xe0)
			return VERDICT_DROP;
		return NOT_FAST;
	}
	err = whole_tuple(skb, p, false);
	if (err)
		return err;
	met = conn_meet(skb, MEET_OPEN);
	if (met < 0)
		return met;
	c = bpf_map_lookup_elem(&lash_conn, &scratch->key);
	if (!c)
		return DROP(p, DROP_CT_INSERT);
	orig = met == MET_ORIG;
	if (orig && !c->orig.packets && nat_taken(&scratch->key)) {
		bpf_map_delete_elem(&lash_conn, &scratch->key);
		return DROP(p, DROP_NAT_EXHAUSTED);
	}

	/* Ingress policy comes in here. */

	forth = &scratch->conn.orig; /* free again: conn_open has copied it */
	back = &scratch->conn.reply;
	__builtin_memset(forth, 0, sizeof(*forth));
	src = endpoint_of(&p->src);
	if (ep)
		decide_pod(forth, IN_HOST, ep, 0);
	else if (remote)
		decide_tunnel(forth, IN_HOST, &remote->node, src ? src->identity : IDENTITY_HOST);
	if (c->flags & CONN_DNAT)
		forth->flags |= nat_flags(c, orig);
	d = orig ? &c->orig : &c->reply;
	other = orig ? &c->reply : &c->orig;
	conn_see(c, d, p, orig, skb->len, ticks());
	count(HOOK_HOST, why, skb->len);
	dir_publish(d, forth, epoch);
	if (src && (src->flags & ENDPOINT_HOST) && !(p->flags & (PKT_ICMP_ERROR | PKT_FRAGMENT))) {
		decide_stack(back, ep ? ep->ifindex : IN_OVERLAY, ACTION_HOST, FOREVER);
		dir_publish(other, back, epoch);
	}
	action = carry_out(skb, p, HOOK_HOST, c, forth, &scratch->key, conn_tell(d, p, orig));
	return action == -1 ? DROP(p, DROP_WRITE) : action;
}

/* from_host_decide: to a pod, or to a service. */
static __always_inline int from_host_decide(struct __sk_buff *skb, struct pkt *p, __u32 why)
{
	int verdict = from_host_slow(skb, p, why);

	return verdict == NOT_FAST ? from_host_service(skb, p, why) : verdict;
}

static __noinline int from_host_fast(struct __sk_buff *skb)
{
	enum slow_reason why = SLOW_NEW;
	struct pkt p;
	int verdict;

	if (skb->protocol == bpf_htons(ETH_P_IP))
		verdict = parse(skb, &p, false);
	else if (skb->protocol == bpf_htons(ETH_P_IPV6))
		verdict = parse(skb, &p, true);
	else
		return VERDICT_DROP; /* lash_host is NOARP: nothing else has a meaning on it */
	if (!verdict)
		verdict = conn_fast(skb, &p, HOOK_HOST, IN_HOST, false, &why);
	return finish(skb, &p, HOOK_HOST, verdict, why);
}

SEC("tc")
int from_host(struct __sk_buff *skb)
{
	int verdict = from_host_fast(skb);

	return likely(verdict != NOT_FAST) ? verdict : slowly(skb, HOOK_HOST, TRACE_FROM_HOST, from_host_decide);
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
