/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* Services, per packet: which frontend a packet asks for, and which backend it gets. For
 * what the socket programs cannot translate, and for everything from outside. A refusal is
 * a backend, too: port 0 of the node's own router address, where no socket can be, so that
 * the stack answers as for any closed port, and pings as for any address of its own. */
#ifndef LASH_LB_H
#define LASH_LB_H

#include "snat.h"

#define FILE_ID FILE_LB

/* What conn_meet looks for beside the connections that are known. */
enum meet {
	MEET_KNOWN   = 0,
	MEET_INSIDE  = 1,        /* services, as they are asked for from inside of the cluster */
	MEET_OUTSIDE = 2,        /* or from outside */
	MEET_OPEN    = 4,        /* and what is for no service opens a connection of its own */
};

/* What it found: a drop reason, nothing, or a connection, whose key is then scratch->key. */
enum met {
	MET_NOTHING,
	MET_ORIG,                /* the packet is the initiator's */
	MET_REPLY,
};

#define ROUTER4 ((struct addr){ .d = { cfg_router4.d[0], cfg_router4.d[1] } })
#define ROUTER6 ((struct addr){ .d = { cfg_router6.d[0], cfg_router6.d[1] } })
#define NODE4 ((struct addr){ .d = { cfg_node4.d[0], cfg_node4.d[1] } })
#define NODE6 ((struct addr){ .d = { cfg_node6.d[0], cfg_node6.d[1] } })

static __always_inline bool has_ports(const struct pkt *p)
{
	return p->proto == IPPROTO_TCP || p->proto == IPPROTO_UDP || p->proto == IPPROTO_SCTP;
}

static __always_inline struct service *frontend_row(struct service_key *key, const struct addr *a, __be16 port, __u8 proto)
{
	__builtin_memset(key, 0, sizeof(*key));
	key->addr = *a;
	key->port = port;
	key->proto = proto;
	return bpf_map_lookup_elem(&lash_services, key);
}

/* concerns tells most of the node's own traffic apart, without a search of a map. mine: the frame is
 * addressed to the node's device. */
static __always_inline bool concerns(const struct pkt *p, bool mine)
{
	__u16 port = bpf_ntohs(p->dport);

	if (p->v6 && p->proto == IPPROTO_ICMPV6 && p->icmp_type >= ICMP6_RS && p->icmp_type <= ICMP6_REDIRECT)
		return false; /* neighbour discovery */
	if (cfg_services && !(p->v6 ? addr_is(&p->dst, cfg_node6) : addr_is(&p->dst, cfg_node4)))
		return mine; /* another address of the node, a service's, or somebody else's */
	if (p->flags & (PKT_ICMP_ERROR | PKT_FRAGMENT))
		return true;
	if (p->flags & PKT_ECHO)
		return p->dport != 0;
	if (p->proto == IPPROTO_UDP && port == cfg_tunnel_port)
		return false; /* other nodes' encapsulated packets */
	if (p->proto == IPPROTO_TCP || p->proto == IPPROTO_UDP)
		return snat_claimed(port) || (cfg_services && port_used(port, PORT_FRONTEND));
	return p->proto != IPPROTO_ICMPV6;
}

/* lb_frontend is the service whose frontend the packet's destination is. NULL: none. */
static __always_inline struct service *lb_frontend(struct scratch *scratch, const struct pkt *p)
{
	struct service *svc = NULL;
	struct endpoint *ep;
	struct addr any = {};

	if (has_ports(p))
		svc = frontend_row(&scratch->frontend, &p->dst, p->dport, p->proto);
	if (svc)
		return svc;
	ep = endpoint_of(&p->dst);
	if (!ep)
		return frontend_row(&scratch->frontend, &p->dst, 0, 0);
	if (!(ep->flags & ENDPOINT_NODEPORT) || !has_ports(p))
		return NULL;
	if (!p->v6)
		addr_from4(&any, 0);
	return frontend_row(&scratch->frontend, &any, p->dport, p->proto);
}

/* lb_allowed: the packet, from outside, may ask for the service. 0 or a drop reason. */
static __always_inline int lb_allowed(struct scratch *scratch, struct pkt *p, const struct service *svc)
{
	struct source_range_key *range = &scratch->range;

	if (!(svc->flags & (FRONTEND_OUTSIDE | FRONTEND_ADDRESS)) && !cfg_lb_outside_cluster_ip)
		return DROP(p, DROP_CLUSTER_IP);
	if (!(svc->flags & FRONTEND_RANGES))
		return 0;
	range->prefixlen = 32 + 128;
	range->service = svc->id;
	range->addr = p->src;
	if (!bpf_map_lookup_elem(&lash_source_ranges, range) == !!(svc->flags & FRONTEND_DENY))
		return 0;
	return DROP(p, DROP_SOURCE_RANGE);
}

static __always_inline __u32 mix(__u32 h, __u32 v)
{
	h ^= v;
	h *= 0x9e3779b1;
	return h ^ (h >> 15);
}

/* lb_hash: the client's end of the connection and the port it asks for, the same on every node. */
static __always_inline __u32 lb_hash(const struct pkt *p)
{
	__u32 h = mix(mix(mix(mix(0, p->src.w[0]), p->src.w[1]), p->src.w[2]), p->src.w[3]);

	return mix(mix(h, (__u32)p->sport << 16 | p->dport), p->proto);
}

/* The slot of a new connection's backend. count is not 0. */
static __always_inline __u32 lb_slot(const struct pkt *p, const struct service *svc, bool outside, __u32 first, __u32 count)
{
	__u32 id = svc->id, entry, *slot;
	void *table;

	if (outside && (svc->flags & FRONTEND_MAGLEV)) {
		table = bpf_map_lookup_elem(&lash_maglev, &id);
		entry = lb_hash(p) % (cfg_maglev_size ?: 1);
		slot = table ? bpf_map_lookup_elem(table, &entry) : NULL;
		if (slot && *slot >= first && *slot < first + count)
			return *slot;
	}
	return first + bpf_get_prandom_u32() % count;
}

/* lb_remembered: the backend that the client of a service with affinity had last, while it takes connections. */
static __always_inline struct affinity *lb_remembered(struct scratch *scratch, const struct pkt *p, const struct service *svc)
{
	struct affinity *a;
	__u32 *member;

	__builtin_memset(&scratch->client, 0, sizeof(scratch->client));
	scratch->client.client = p->src;
	scratch->client.service = svc->id;
	a = bpf_map_lookup_elem(&lash_affinity, &scratch->client);
	if (!a || past(ticks(), a->used + svc->affinity * cfg_hz))
		return NULL;
	__builtin_memset(&scratch->member, 0, sizeof(scratch->member));
	scratch->member.service = svc->id;
	scratch->member.addr = a->addr;
	scratch->member.port = a->port;
	member = bpf_map_lookup_elem(&lash_members, &scratch->member);
	return member && *member == MEMBER_ACTIVE ? a : NULL;
}

/* lb_refuse sends the packet to where nobody listens, and pings to who answers them. */
static __always_inline int lb_refuse(struct pkt *p, struct conn *c, bool ping)
{
	if (!ping && !cfg_lb_refuse)
		return DROP(p, DROP_NO_SERVICE);
	c->to_addr = p->v6 ? ROUTER6 : ROUTER4;
	c->to_port = 0;
	c->service = 0;
	return addr_zero(&c->to_addr) ? DROP(p, DROP_NO_SERVICE) : 0;
}

/* lb_choose writes into the connection which backend it gets. 0 or a drop reason. */
static __noinline int lb_choose(struct pkt *p, struct scratch *scratch, const struct service *svc, struct conn *c, bool outside)
{
	bool local = svc->flags & (outside ? FRONTEND_LOCAL_OUT : FRONTEND_LOCAL_IN);
	__u32 first = local ? 1 : svc->first, count = local ? svc->local : svc->count;
	struct backend_key key = { .service = svc->id };
	struct affinity *had = NULL;
	struct backend *b;

	if (svc->flags & FRONTEND_ADDRESS)
		return lb_refuse(p, c, p->flags & PKT_ECHO);
	if (!count) /* what only other nodes have they shall get: whoever sent it here is to notice */
		return outside && local && svc->count ? DROP(p, DROP_NO_SERVICE) : lb_refuse(p, c, false);
	c->service = svc->id;
	if (svc->affinity)
		had = lb_remembered(scratch, p, svc);
	if (had && !(local && !endpoint_of(&had->addr))) {
		c->to_addr = had->addr;
		c->to_port = had->port;
		had->used = ticks();
		return 0;
	}
	key.slot = lb_slot(p, svc, outside, first, count);
	b = bpf_map_lookup_elem(&lash_backends, &key);
	if (!b)
		return lb_refuse(p, c, false);
	c->to_addr = b->addr;
	c->to_port = b->port;
	if (svc->affinity) {
		struct affinity *now = &scratch->affinity;

		now->addr = b->addr;
		now->port = b->port;
		now->pad = 0;
		now->used = ticks();
		bpf_map_update_elem(&lash_affinity, &scratch->client, now, BPF_ANY);
	}
	return 0;
}

/* lb_open chooses where the connection c, not yet anybody's but this packet's, goes that asks for svc. MET_ORIG;
 * MET_NOTHING: the packet belongs to a socket of the node; or a drop reason. */
static __always_inline int lb_open(struct __sk_buff *skb, struct pkt *p, struct scratch *scratch, struct service *svc, struct conn *c, bool outside)
{
	/* A TCP connection that nobody here knows: Maglev leads it to where it was, everything else resets it. */
	bool lost = p->proto == IPPROTO_TCP && !(p->tcp & TCP_SYN) && !(outside && (svc->flags & FRONTEND_MAGLEV));
	int err;

	if (outside) {
		/* The node's sockets may have had the port before the service. */
		if (lost && socket_has(skb, p, NULL, 0))
			return MET_NOTHING;
		err = lb_allowed(scratch, p, svc);
		if (err)
			return err;
	}
	err = lost ? lb_refuse(p, c, false) : lb_choose(p, scratch, svc, c, outside);
	if (err)
		return err;
	c->flags |= CONN_DNAT;
	return MET_ORIG;
}

/* conn_meet finds the connection of the packet in lash_scratch by either of its tuples, or opens one as
 * how (enum meet) says: to a backend, or of its own. Of a service's connection the packet is translated.
 * Enum met, or a drop reason. */
__noinline int conn_meet(struct __sk_buff *skb, __u32 how)
{
	__u32 zero = 0;
	struct scratch *scratch = bpf_map_lookup_elem(&lash_scratch, &zero);
	struct service *svc = NULL;
	struct conn_key *k;
	struct conn *c;
	struct pkt *p;
	bool from_hi;
	int met = MET_NOTHING, err;

	if (!scratch)
		return -DROP_CT_INSERT;
	p = (struct pkt *)scratch->pkt;
	k = &scratch->key;
	from_hi = pkt_key(k, p);
	if (scratch->why != SLOW_NEW) { /* which says that neither has been found */
		c = bpf_map_lookup_elem(&lash_conn, k);
		if (c) {
			/* What is closed or expired does not bind. */
			if (!past(ticks(), c->expires) && !(tcp_opens(p) && conn_closed(c)))
				met = conn_from_initiator(c, from_hi) ? MET_ORIG : MET_REPLY;
		} else {
			c = conn_answered(k, p);
			if (c)
				met = MET_REPLY;
			else
				pkt_key(k, p);
		}
	}
	if (met == MET_NOTHING) {
		if (cfg_services && (how & (MEET_INSIDE | MEET_OUTSIDE)))
			svc = lb_frontend(scratch, p);
		if (!svc && !(how & MEET_OPEN))
			return MET_NOTHING;
		c = conn_fresh(scratch, p, from_hi);
		met = svc ? lb_open(skb, p, scratch, svc, c, how & MEET_OUTSIDE) : MET_ORIG;
		if (met <= MET_NOTHING)
			return met;
		err = conn_put(p);
		if (err < 0)
			return err;
		if (err) { /* another CPU has opened it */
			c = bpf_map_lookup_elem(&lash_conn, k);
			if (!c)
				return DROP(p, DROP_CT_INSERT);
			met = conn_from_initiator(c, from_hi) ? MET_ORIG : MET_REPLY;
		}
	}
	if (c && (c->flags & CONN_DNAT) && nat_apply(skb, p, c, k, met == MET_ORIG ? DIR_TO_NAT : DIR_NO_NAT))
		return DROP(p, DROP_WRITE);
	return met;
}

/* lb_claim gives a service's connection its translated tuple: on address nat, or on the client's own. Once. */
static __always_inline int lb_claim(struct __sk_buff *skb, struct pkt *p, struct conn *c, struct addr *nat)
{
	return c->flags & CONN_CLAIMED ? 0 : nat_claim(skb, p, c, nat);
}

/* lb_direct: the connection's frontend, under its key in scratch, has backends answer by themselves. */
static __always_inline bool lb_direct(struct scratch *scratch, const struct conn *c)
{
	struct service *svc;
	struct addr any = {};
	__be16 port;
	const struct addr *frontend = conn_responder(c, &scratch->key, &port);

	svc = frontend_row(&scratch->frontend, frontend, port, scratch->key.proto);
	if (!svc) {
		if (addr_is4(frontend))
			addr_from4(&any, 0);
		svc = frontend_row(&scratch->frontend, &any, port, scratch->key.proto);
	}
	return svc && (svc->flags & FRONTEND_DSR);
}

/* to_client sends a backend's answer on to the client outside whose connection came in here. */
static __noinline int to_client(struct __sk_buff *skb, struct pkt *p, const enum hook hook, struct conn *c, __u32 why)
{
	__u32 zero = 0;
	struct scratch *scratch = bpf_map_lookup_elem(&lash_scratch, &zero);
	struct conn_dir *forth;
	struct hop *hop;
	int action;

	if (!scratch)
		return DROP(p, DROP_CT_INSERT);
	hop = (struct hop *)scratch->plan;
	forth = &scratch->conn.orig;
	__builtin_memset(forth, 0, sizeof(*forth));
	action = route(skb, p, false, hop, &scratch->tell);
	if (action < 0)
		return action;
	if (action == ACTION_HOST || p->ttl <= 1)
		return DROP(p, DROP_UNROUTABLE); /* it comes from no address that the stack would send from */
	conn_see(c, &c->reply, p, false, skb->len, ticks());
	count(hook, action == ACTION_NEIGH ? SLOW_NEIGHBOUR : why, skb->len);
	if (action == ACTION_EGRESS && !(p->flags & (PKT_ICMP_ERROR | PKT_FRAGMENT))) {
		decide_egress(forth, hook == HOOK_OVERLAY ? IN_OVERLAY : IN_NETDEV, hop, nat_flags(c, false));
		dir_publish(&c->reply, forth, current_epoch());
	}
	if (conn_tell(&c->reply, p, false) != TRACE_NOT)
		observe(skb, TRACE_TO_NETWORK | OBSERVE_NAT, hop->ifindex, TRACE_REPLY, c->expires / cfg_hz);
	/* The neighbour is found by the packet itself, or checked by it each time the route is. */
	action = by_neighbour(skb, p, hop);
	return action == -1 ? DROP(p, DROP_WRITE) : action;
}

#undef FILE_ID
#endif
