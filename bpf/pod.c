//go:build ignore

/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* The host side of every pod's veth pair, ingress: what the pod sends. What is sent to the
 * pod has passed another program already (from_container, from_netdev, from_overlay, from_host). */
#include "lib/lb.h"
#include "lib/neigh.h"

#define FILE_ID FILE_POD

/* What the slow path decides before any of it is published. */
struct plan {
	struct conn_dir forth;   /* the packet's own direction */
	struct conn_dir back;
	struct hop hop;
	__u32 why;
};

/* Back into the pod that iface is about, behind ifindex. */
static __always_inline void decide_back(struct conn_dir *d, __u32 in, __u32 ifindex, const struct iface *iface, __u8 flags)
{
	d->in = in;
	d->action = ACTION_PEER;
	d->flags = flags;
	d->out_ifindex = ifindex;
	d->dmac = iface->mac;
	d->smac = iface->node_mac;
	d->deadline = ticks() + FOREVER;
}

/* plan_route decides what leaves the node: both directions, masquerading with them when
 * the packet is the initiator's (orig). The action for this packet, or a drop reason. */
static __always_inline int plan_route(struct __sk_buff *skb, struct pkt *p, struct plan *plan,
				      const struct iface *iface, struct scratch *scratch, struct conn *c, bool orig)
{
	__u32 in = skb->ifindex;
	struct device *dev;
	int action, err;

	action = route(skb, p, false, &plan->hop, &plan->why);
	if (action < 0)
		return action;
	if (!cfg_host_routing && !(c->flags & (CONN_DNAT | CONN_DSR)) && !(p->flags & PKT_TRANSLATED)) {
		decide_stack(&plan->forth, in, ACTION_HOST, FOREVER);
		return ACTION_HOST;
	}
	if (action == ACTION_HOST) {
		decide_stack(&plan->forth, in, ACTION_HOST, 0);
		return ACTION_HOST;
	}
	/* A device that Lash does not manage belongs to somebody whose hooks are in the stack. */
	dev = bpf_map_lookup_elem(&lash_devices, &plan->hop.ifindex);
	if (!dev) {
		plan->why = SLOW_UNROUTED;
		decide_stack(&plan->forth, in, ACTION_HOST, cfg_hz);
		return ACTION_HOST;
	}
	if (orig && !(p->flags & PKT_TRANSLATED)) {
		err = masquerade(skb, p, scratch, c, dev);
		if (err)
			return err;
	}
	decide_egress(&plan->forth, in, &plan->hop, 0);
	/* The answer comes in by the network and goes straight into this pod. */
	decide_back(&plan->back, IN_NETDEV, in, iface, DIR_TTL);
	return action;
}

static __noinline int from_container_slow(struct __sk_buff *skb, struct pkt *p, __u32 why)
{
	__u32 in = skb->ifindex, zero = 0;
	struct scratch *scratch = bpf_map_lookup_elem(&lash_scratch, &zero);
	struct plan *plan;
	struct endpoint *ep;
	struct iface *iface;
	struct conn_key *k;
	struct conn_dir *d;
	struct conn *c;
	struct ipcache_entry *remote;
	enum trace_reason tell;
	bool orig, exceeds;
	__u32 epoch = current_epoch();
	int action, met, err = 0;

	_Static_assert(sizeof(*plan) <= sizeof(scratch->plan), "struct plan outgrew its place in struct scratch");
	if (!scratch)
		return DROP(p, DROP_CT_INSERT);
	plan = (struct plan *)scratch->plan;
	__builtin_memset(plan, 0, sizeof(*plan));
	plan->why = why;
	k = &scratch->key;

	/* Who is it? Nobody sends under another's address. */
	iface = bpf_map_lookup_elem(&lash_ifaces, &in);
	if (!iface)
		return DROP(p, DROP_NO_ENDPOINT);
	if (!addr_equal(&p->src, p->v6 ? &iface->ip6 : &iface->ip4))
		return DROP(p, DROP_INVALID_SOURCE);
	err = whole_tuple(skb, p, cfg_host_routing); /* what the stack sends on is translated when it leaves */
	if (err)
		return err;

	/* The connection, with a service that the socket could not translate. From here on the packet
	 * is addressed to the backend, or comes from the frontend. */
	met = conn_meet(skb, MEET_INSIDE | MEET_OPEN);
	if (met < 0)
		return met;
	c = bpf_map_lookup_elem(&lash_conn, k);
	if (!c)
		return DROP(p, DROP_CT_INSERT);
	orig = met == MET_ORIG;

	/* Egress policy, and ingress policy for a destination on this node, come in here. */

	/* The way. */
	ep = endpoint_of(&p->dst);
	if (ep && !(ep->flags & ENDPOINT_HOST)) {
		decide_pod(&plan->forth, in, ep, DIR_TTL);
		decide_back(&plan->back, ep->ifindex, in, iface, DIR_TTL);
		action = ACTION_PEER;
	} else if (ep) {
		decide_stack(&plan->forth, in, ACTION_HOST, FOREVER);
		decide_back(&plan->back, IN_HOST, in, iface, 0);
		action = ACTION_HOST;
	} else if ((remote = tunnel_to(&p->dst))) {
		decide_tunnel(&plan->forth, in, &remote->node, iface->identity);
		/* The answer comes out of the tunnel and goes straight into this pod; with legacy host routing, up the stack. */
		if (cfg_host_routing)
			decide_back(&plan->back, IN_OVERLAY, in, iface, DIR_TTL);
		action = ACTION_TUNNEL;
	} else {
		action = plan_route(skb, p, plan, iface, scratch, c, orig);
		if (action < 0)
			return action;
	}
	if (orig && (c->flags & CONN_DNAT)) {
		/* A pod that is its own backend would take its own address for a forgery. */
		bool self = ep && ep->ifindex == in;
		struct addr nat = !self ? p->src : p->v6 ? ROUTER6 : ROUTER4;

		err = lb_claim(skb, p, c, &nat);
		if (err)
			return err;
	}
	/* What the stack masquerades when it leaves is left to it. */
	if ((c->flags & CONN_DNAT) || action == ACTION_EGRESS || action == ACTION_NEIGH) {
		plan->forth.flags |= nat_flags(c, orig);
		plan->back.flags |= nat_flags(c, !orig);
	}
	d = orig ? &c->orig : &c->reply;
	/* What the stack answers better: time exceeded, fragmentation needed. */
	exceeds = (p->ttl <= 1 && (plan->forth.flags & DIR_TTL)) || (plan->forth.mtu && too_big(skb, p, plan->forth.mtu));
	if (exceeds)
		plan->why = p->ttl <= 1 ? SLOW_TTL : SLOW_MTU;
	else if (action == ACTION_NEIGH)
		plan->why = SLOW_NEIGHBOUR;
	conn_see(c, d, p, orig, skb->len, ticks());
	tell = conn_tell(d, p, orig);
	count(HOOK_POD, plan->why, skb->len);

	/* A neighbour that is not known is found by the packet itself, and one that is
	 * known is checked again each time the route is. Neither is remembered half. */
	if (!exceeds && (action == ACTION_NEIGH || (action == ACTION_EGRESS && why == SLOW_DEADLINE))) {
		if (action == ACTION_EGRESS)
			dir_publish(d, &plan->forth, epoch);
		if (nat_apply(skb, p, c, k, plan->forth.flags))
			return DROP(p, DROP_WRITE);
		if (tell != TRACE_NOT)
			observe(skb, TRACE_TO_NETWORK | OBSERVE_EGRESS | (plan->forth.flags & DIR_TO_NAT ? OBSERVE_NAT : 0),
				plan->hop.ifindex, tell, c->expires / cfg_hz);
		err = by_neighbour(skb, p, &plan->hop);
		return err == -1 ? DROP(p, DROP_WRITE) : err;
	}
	/* An ICMP error goes its own way, which is not that of what else has its key. */
	if (!(p->flags & PKT_ICMP_ERROR) && action != ACTION_NEIGH) {
		dir_publish(d, &plan->forth, epoch);
		if (plan->back.action)
			dir_publish(orig ? &c->reply : &c->orig, &plan->back, epoch);
	}
	if (exceeds) {
		if (tell != TRACE_NOT)
			observe(skb, TRACE_TO_STACK | OBSERVE_EGRESS, 0, tell, c->expires / cfg_hz);
		action = to_host(skb, p);
		return action == -1 ? DROP(p, DROP_WRITE) : action;
	}
	action = carry_out(skb, p, HOOK_POD, c, &plan->forth, k, tell);
	return action == -1 ? DROP(p, DROP_WRITE) : action;
}

static __noinline int from_container_nd(struct __sk_buff *skb, struct pkt *p, bool *done)
{
	__u32 in = skb->ifindex;
	struct iface *iface;

	if (p->icmp_type < ICMP6_RS || p->icmp_type > ICMP6_REDIRECT) {
		if (p->icmp_type != ICMP6_MLD2 && p->icmp_type != 131 && p->icmp_type != 132)
			return 0;
		*done = true;
		return VERDICT_DROP; /* membership reports: there is nobody to hear them, and nothing is lost */
	}
	*done = true;
	iface = bpf_map_lookup_elem(&lash_ifaces, &in);
	if (p->icmp_type == ICMP6_NS && iface && answer_nd(skb, iface)) {
		note(skb, in, ACTION_EGRESS);
		return bpf_redirect(in, 0);
	}
	if (p->icmp_type == ICMP6_REDIRECT)
		return DROP(p, DROP_ICMPV6);
	return VERDICT_DROP; /* solicitations for others (duplicate address detection): no answer is the answer */
}

/* from_container_other: what is not IP, or carries a tag. */
static __noinline int from_container_other(struct __sk_buff *skb)
{
	__u32 in = skb->ifindex;
	struct iface *iface;
	struct pkt p = {};
	int verdict;

	/* The kernel has taken the tag off and would put it on again where the packet leaves. */
	if (skb->vlan_present) {
		verdict = DROP(&p, DROP_VLAN);
	} else if (skb->protocol == bpf_htons(ETH_P_ARP)) {
		iface = bpf_map_lookup_elem(&lash_ifaces, &in);
		if (!iface || !answer_arp(skb, iface))
			return VERDICT_DROP; /* for somebody who does not exist here: silence */
		note(skb, in, ACTION_EGRESS);
		return bpf_redirect(in, 0);
	} else {
		verdict = DROP(&p, DROP_UNSUPPORTED_L3);
	}
	return finish(skb, &p, HOOK_POD, verdict, SLOW_NOT);
}

static __noinline int from_container_fast(struct __sk_buff *skb)
{
	enum slow_reason why = SLOW_NEW;
	struct pkt p;
	int verdict;

	if (unlikely(skb->vlan_present))
		return from_container_other(skb);
	if (skb->protocol == bpf_htons(ETH_P_IP)) {
		verdict = parse(skb, &p, false);
	} else if (skb->protocol == bpf_htons(ETH_P_IPV6)) {
		verdict = parse(skb, &p, true);
		if (unlikely(p.proto == IPPROTO_ICMPV6) && !verdict) {
			bool done = false;

			verdict = from_container_nd(skb, &p, &done);
			if (done && verdict >= VERDICT_NEXT)
				return verdict;
		}
	} else {
		return from_container_other(skb);
	}
	if (likely(!verdict))
		verdict = conn_fast(skb, &p, HOOK_POD, skb->ifindex, false, &why);
	return finish(skb, &p, HOOK_POD, verdict, why);
}

SEC("tc")
int from_container(struct __sk_buff *skb)
{
	int verdict = from_container_fast(skb);

	return likely(verdict != NOT_FAST) ? verdict : slowly(skb, HOOK_POD, TRACE_FROM_ENDPOINT, from_container_slow);
}

/* clock tells the agent the kernel's ticks, which are the unit of every deadline. */
SEC("tc")
int clock(struct __sk_buff *skb)
{
	__u32 zero = 0;
	struct runtime *rt = bpf_map_lookup_elem(&lash_runtime, &zero);

	if (rt)
		rt->ticks = bpf_jiffies64();
	return 0;
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
