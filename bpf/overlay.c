//go:build ignore

/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* The tunnel device, ingress: what other nodes send encapsulated, decapsulated by the
 * kernel. The VNI is the sender's identity. */
#include "lib/dsr.h"

#define FILE_ID FILE_OVERLAY

#define IDENTITY_MAX 65535

/* from_node: only nodes of the cluster may encapsulate, and they name an identity.
 * node receives the sender's address. 0 or a drop reason. */
static __noinline int from_node(struct __sk_buff *skb, struct pkt *p, struct addr *node)
{
	struct ipcache_entry *e;
	__u32 vni = 0;

	if (tunnel_sender(skb, node, &vni))
		return DROP(p, DROP_TUNNEL_KEY);
	e = ipcache_of(node);
	if (!e || !(e->flags & IPCACHE_PEER))
		return DROP(p, DROP_UNKNOWN_SENDER);
	if (vni == IDENTITY_UNKNOWN || vni > IDENTITY_MAX)
		return DROP(p, DROP_INVALID_IDENTITY);
	return 0;
}

static __noinline int from_overlay_slow(struct __sk_buff *skb, struct pkt *p, __u32 why)
{
	__u32 epoch = current_epoch(), zero = 0;
	struct scratch *scratch = bpf_map_lookup_elem(&lash_scratch, &zero);
	struct conn_dir *forth, *back, *d;
	struct endpoint *ep, *src;
	struct addr node = {};
	struct conn *c;
	bool orig;
	int action, met, err;

	if (!scratch)
		return DROP(p, DROP_CT_INSERT);
	err = from_node(skb, p, &node);
	if (err)
		return err;
	src = endpoint_of(&p->src);
	if (src)
		return DROP(p, DROP_INVALID_SOURCE); /* what lives on this node does not come from another */
	if (!endpoint_of(&p->dst))
		return DROP(p, DROP_UNROUTABLE);
	err = whole_tuple(skb, p, false);
	if (err)
		return err;
	met = conn_meet(skb, MEET_KNOWN);
	if (met < 0)
		return met;
	c = met == MET_NOTHING ? NULL : bpf_map_lookup_elem(&lash_conn, &scratch->key);
	ep = endpoint_of(&p->dst); /* of a service's connection, the client */
	if (!ep)
		return c ? to_client(skb, p, HOOK_OVERLAY, c, why) : DROP(p, DROP_UNROUTABLE);
	if (!cfg_host_routing && !(ep->flags & ENDPOINT_HOST) && !direct(p, c)) {
		/* The stack routes it to lash_host, where the connection is kept. */
		count(HOOK_OVERLAY, why, skb->len);
		action = to_host(skb, p);
		return action == -1 ? DROP(p, DROP_WRITE) : action;
	}
	if (!c) {
		met = conn_meet(skb, MEET_OPEN);
		if (met < 0)
			return met;
		c = bpf_map_lookup_elem(&lash_conn, &scratch->key);
		if (!c)
			return DROP(p, DROP_CT_INSERT);
	}
	orig = met == MET_ORIG;
	err = dsr_note(skb, p, c);
	if (err)
		return err;

	/* Ingress policy comes in here. */

	forth = &scratch->conn.orig; /* free again: conn_open has copied it */
	back = &scratch->conn.reply;
	__builtin_memset(forth, 0, sizeof(*forth));
	if (ep->flags & ENDPOINT_HOST) {
		decide_stack(forth, IN_OVERLAY, ACTION_HOST, FOREVER);
		decide_tunnel(back, IN_HOST, &node, IDENTITY_HOST);
	} else {
		decide_pod(forth, IN_OVERLAY, ep, DIR_TTL);
		decide_tunnel(back, ep->ifindex, &node, ep->identity);
	}
	if (c->flags & CONN_DNAT) { /* of CONN_DSR, answers do not go by the tunnel */
		forth->flags |= nat_flags(c, orig);
		back->flags |= nat_flags(c, !orig);
	}
	d = orig ? &c->orig : &c->reply;
	conn_see(c, d, p, orig, skb->len, ticks());
	count(HOOK_OVERLAY, p->ttl <= 1 && (forth->flags & DIR_TTL) ? SLOW_TTL : why, skb->len);
	dir_publish(d, forth, epoch);
	/* The answer goes back to the node that this came from, while the ipcache agrees. */
	if (!(p->flags & (PKT_ICMP_ERROR | PKT_FRAGMENT))) {
		struct ipcache_entry *e = tunnel_to(&p->src);

		if (e && addr_equal(&e->node, &node))
			dir_publish(orig ? &c->reply : &c->orig, back, epoch);
	}
	if (p->ttl <= 1 && (forth->flags & DIR_TTL))
		action = to_host(skb, p);
	else
		action = carry_out(skb, p, HOOK_OVERLAY, c, forth, &scratch->key, conn_tell(d, p, orig));
	return action == -1 ? DROP(p, DROP_WRITE) : action;
}

static __noinline int from_overlay_fast(struct __sk_buff *skb)
{
	enum slow_reason why = SLOW_NEW;
	struct pkt p;
	int verdict;

	if (skb->protocol == bpf_htons(ETH_P_IP)) {
		verdict = parse(skb, &p, false);
	} else if (skb->protocol == bpf_htons(ETH_P_IPV6)) {
		verdict = parse(skb, &p, true);
	} else {
		__builtin_memset(&p, 0, sizeof(p));
		verdict = DROP(&p, DROP_UNSUPPORTED_L3);
	}
	if (!verdict)
		verdict = conn_fast(skb, &p, HOOK_OVERLAY, IN_OVERLAY, false, &why);
	return finish(skb, &p, HOOK_OVERLAY, verdict, why);
}

SEC("tc")
int from_overlay(struct __sk_buff *skb)
{
	int verdict = from_overlay_fast(skb);

	return likely(verdict != NOT_FAST) ? verdict : slowly(skb, HOOK_OVERLAY, TRACE_FROM_OVERLAY, from_overlay_slow);
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
