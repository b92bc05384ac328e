/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* Decisions: what becomes of a direction of a connection. The kernel's own routing
 * table is asked, so that whoever installs routes (the agent, a person, a routing
 * daemon) is followed. */
#ifndef LASH_ROUTE_H
#define LASH_ROUTE_H

#include "forward.h"

#define FILE_ID FILE_ROUTE

#ifndef AF_INET
#define AF_INET  2
#define AF_INET6 10
#endif

static __always_inline struct endpoint *endpoint_of(const struct addr *a)
{
	return bpf_map_lookup_elem(&lash_endpoints, a);
}

/* pods_known: the node has one pod CIDR of the packet's family, known at load time. */
static __always_inline bool pods_known(const struct pkt *p)
{
	return p->v6 ? mask_set(cfg_pod6_mask) : mask_set(cfg_pod4_mask);
}

/* for_pods: the destination may be a pod of this node. With a known pod CIDR the node's
 * own traffic is told apart without a lookup. */
static __always_inline bool for_pods(const struct pkt *p, const struct addr *a)
{
	if (!pods_known(p))
		return true;
	return p->v6 ? addr_within(a, cfg_pod6_net, cfg_pod6_mask) : addr_within(a, cfg_pod4_net, cfg_pod4_mask);
}

/* slowly is the second half of a program: what becomes of a packet that the first left in lash_scratch. slow decides, for
 * whatever has no decision or has lost it meanwhile. */
static __always_inline int slowly(struct __sk_buff *skb, const enum hook hook, enum trace_point from,
				  int (*slow)(struct __sk_buff *skb, struct pkt *p, __u32 why))
{
	__u32 zero = 0;
	struct scratch *scratch = bpf_map_lookup_elem(&lash_scratch, &zero);
	int verdict = NOT_FAST;
	struct pkt *p;

	if (!scratch)
		return VERDICT_DROP;
	p = (struct pkt *)scratch->pkt;
	/* Of what the network sends to the node itself, only what turns out to be translated is told. */
	if (hook != HOOK_NETDEV || for_pods(p, &p->dst))
		arrived(skb, from);
	if (scratch->why == SLOW_REPORT)
		verdict = conn_report(skb, p, hook);
	if (verdict == NOT_FAST)
		verdict = slow(skb, p, scratch->why);
	return verdict < NOT_FAST ? drop(skb, p, hook, verdict) : verdict;
}

/* Into a pod of this node. */
static __always_inline void decide_pod(struct conn_dir *d, __u32 in, const struct endpoint *ep, __u8 flags)
{
	d->in = in;
	d->action = ACTION_PEER;
	d->flags = flags;
	d->out_ifindex = ep->ifindex;
	d->mtu = 0;
	d->dmac = ep->mac;
	d->smac = ep->node_mac;
	d->deadline = ticks() + FOREVER;
}

/* Up the stack: for good, or (when only this moment's routes say so) for a second. */
static __always_inline void decide_stack(struct conn_dir *d, __u32 in, enum conn_action action, __u32 lasts)
{
	__builtin_memset(d, 0, sizeof(*d));
	d->in = in;
	d->action = action;
	d->deadline = ticks() + lasts;
}

struct hop {
	struct bpf_redir_neigh neigh; /* for ACTION_NEIGH */
	__u32 ifindex;
	__u16 mtu;
	struct mac dmac, smac;
};

static __always_inline void fib_ask(struct bpf_fib_lookup *f, const struct pkt *p,
				    const struct addr *src, __be16 sport, const struct addr *dst, __be16 dport)
{
	__builtin_memset(f, 0, sizeof(*f));
	f->l4_protocol = p->proto;
	f->sport = sport;
	f->dport = dport;
	f->ifindex = cfg_host_ifindex;
	if (p->v6) {
		f->family = AF_INET6;
		__builtin_memcpy(f->ipv6_src, src, 16);
		__builtin_memcpy(f->ipv6_dst, dst, 16);
	} else {
		f->family = AF_INET;
		f->ipv4_src = src->w[3];
		f->ipv4_dst = dst->w[3];
	}
}

/* route asks the FIB for the way from src to dst. ACTION_EGRESS with the hop's MACs;
 * ACTION_NEIGH when only the neighbour is not known yet; ACTION_HOST, with the reason
 * in *why, for whatever the stack knows better (no route, a route to somewhere else
 * than a device, a packet too big for it, a device that is not Lash's). */
static __noinline int route(struct __sk_buff *skb, struct pkt *p, bool back, struct hop *hop, __u32 *why)
{
	const struct addr *src = back ? &p->dst : &p->src, *dst = back ? &p->src : &p->dst;
	__be16 sport = back ? p->dport : p->sport, dport = back ? p->sport : p->dport;
	__u32 zero = 0;
	struct scratch *scratch = bpf_map_lookup_elem(&lash_scratch, &zero);
	struct bpf_fib_lookup *f;
	int action = ACTION_EGRESS;
	long rc;

	if (!scratch)
		return DROP(p, DROP_FIB);
	f = (struct bpf_fib_lookup *)scratch->fib;
	fib_ask(f, p, src, sport, dst, dport);
	/* Whoever asks for a packet of one byte, which is never too big, is told the route's MTU. Only kernels before
	 * 5.12 do not tell, and none does without a neighbour. */
	f->tot_len = 1;
	rc = bpf_fib_lookup(skb, f, sizeof(*f), 0);
	hop->mtu = rc == BPF_FIB_LKUP_RET_SUCCESS && f->mtu_result != 1 ? f->mtu_result : 0;
	if (unlikely(hop->mtu && too_big(skb, p, hop->mtu))) {
		/* Too big for the device, or only for the route? */
		fib_ask(f, p, src, sport, dst, dport);
		rc = bpf_fib_lookup(skb, f, sizeof(*f), 0);
	}
	switch (rc) {
	case BPF_FIB_LKUP_RET_SUCCESS:
		break;
	case BPF_FIB_LKUP_RET_NO_NEIGH:
		action = ACTION_NEIGH;
		break;
	case BPF_FIB_LKUP_RET_FRAG_NEEDED:
		*why = SLOW_MTU;
		return ACTION_HOST;
	default:
		*why = SLOW_UNROUTED;
		return rc < 0 ? DROP(p, DROP_FIB) : ACTION_HOST;
	}
	/* Kernels before 5.15 leave the input device in place when there is no neighbour. It is the
	 * route's own device for this node's pods, whose addresses have no neighbour when nobody has them. */
	hop->ifindex = f->ifindex;
	if (f->ifindex == cfg_host_ifindex && action == ACTION_NEIGH && !(pods_known(p) && for_pods(p, dst)))
		hop->ifindex = cfg_direct_ifindex;
	if (hop->ifindex == cfg_host_ifindex)
		return DROP(p, DROP_UNROUTABLE); /* a pod address of this node that nobody has */
	__builtin_memcpy(&hop->dmac, f->dmac, ETH_ALEN);
	__builtin_memcpy(&hop->smac, f->smac, ETH_ALEN);
	hop->neigh.nh_family = f->family;
	if (f->family == AF_INET6)
		__builtin_memcpy(hop->neigh.ipv6_nh, f->ipv6_dst, 16);
	else
		hop->neigh.ipv4_nh = f->ipv4_dst;
	if (unlikely(!hop->mtu)) {
		fib_ask(f, p, src, sport, dst, dport);
		f->tot_len = 0xffff;
		if (bpf_fib_lookup(skb, f, sizeof(*f), 0) == BPF_FIB_LKUP_RET_FRAG_NEEDED && f->mtu_result != 0xffff)
			hop->mtu = f->mtu_result;
	}
	return action;
}

static __always_inline void decide_egress(struct conn_dir *d, __u32 in, const struct hop *hop, __u8 flags)
{
	d->in = in;
	d->action = ACTION_EGRESS;
	d->flags = flags | DIR_TTL;
	d->out_ifindex = hop->ifindex;
	d->mtu = hop->mtu;
	d->dmac = hop->dmac;
	d->smac = hop->smac;
	d->deadline = ticks() + cfg_hz;
}

/* Through the tunnel. Which prefixes, and to where, the agent says: no route is asked.
 * On the wire there is one world, whatever families the two nodes have. */
static __always_inline void decide_tunnel(struct conn_dir *d, __u32 in, const struct addr *node, __u32 identity)
{
	__builtin_memset(d, 0, sizeof(*d));
	d->in = in;
	d->action = ACTION_TUNNEL;
	d->out_ifindex = cfg_overlay_ifindex;
	d->vni = is_world(identity) ? IDENTITY_WORLD : identity;
	d->node = *node;
	d->deadline = ticks() + FOREVER;
}

/* tunnel_to: the row of a destination that is reached through the tunnel, else NULL. */
static __noinline struct ipcache_entry *tunnel_to(const struct addr *a)
{
	struct ipcache_entry *e;

	if (!cfg_overlay_ifindex)
		return NULL;
	e = ipcache_of(a);
	return e && (e->flags & IPCACHE_TUNNEL) ? e : NULL;
}

/* by_neighbour sends this one packet through the kernel's neighbour table, which
 * queues it while it resolves and keeps the entry checked while it is used. */
static __always_inline int by_neighbour(struct __sk_buff *skb, const struct pkt *p, struct hop *hop)
{
	struct addr zero = {};

	if (write_hop(skb, p, &zero, true))
		return -1;
	note(skb, hop->ifindex, ACTION_NEIGH);
	skb->mark = (skb->mark & ~MARK_MASK) | MARK_DONE;
	return bpf_redirect_neigh(hop->ifindex, &hop->neigh, sizeof(hop->neigh), 0);
}

/* fragment_ports gives fragments the ports of their datagram. 0 or a drop reason. */
static __always_inline int fragment_ports(struct pkt *p)
{
	struct frag_key key = { .src = p->src, .dst = p->dst, .id = p->frag_id, .proto = p->proto };
	struct frag_ports ports, *known;

	if (!(p->flags & PKT_LATER)) {
		ports.sport = p->sport;
		ports.dport = p->dport;
		bpf_map_update_elem(&lash_frags, &key, &ports, BPF_ANY);
		return 0;
	}
	known = bpf_map_lookup_elem(&lash_frags, &key);
	if (!known)
		return DROP(p, DROP_NO_FRAGMENT);
	p->sport = known->sport;
	p->dport = known->dport;
	return 0;
}

/* whole_tuple makes p's tuple one to search by: fragments get the ports of their datagram, and errors about a translated
 * packet speak of addresses that its other end knows (translate_report). 0 or a drop reason. */
static __always_inline int whole_tuple(struct __sk_buff *skb, struct pkt *p, bool masqueraded)
{
	int err = 0;

	if (p->flags & PKT_FRAGMENT)
		err = fragment_ports(p);
	if (!err && (p->flags & PKT_ICMP_ERROR))
		err = translate_report(skb, p, masqueraded);
	return err;
}

#undef FILE_ID
#endif
