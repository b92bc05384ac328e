/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* Masquerading: which connections get the node's address, and which source port. */
#ifndef LASH_SNAT_H
#define LASH_SNAT_H

#include "route.h"

#define FILE_ID FILE_SNAT

/* leaves_cluster: the destination is neither inside the native routing CIDR nor known as a
 * node or as a pod somewhere, and nobody has excepted it. In tunnel mode the network does not
 * know pods, and other nodes expect them from the tunnel: there, nodes are always outside. */
static __always_inline bool leaves_cluster(struct scratch *scratch, const struct pkt *p)
{
	const struct addr *dst = &p->dst;
	struct ipcache_entry *e;

	if (p->v6 ? !cfg_masquerade6 : !cfg_masquerade4)
		return false;
	if (p->v6) {
		if (mask_set(cfg_native6_mask) && addr_within(dst, cfg_native6_net, cfg_native6_mask))
			return false;
	} else if (mask_set(cfg_native4_mask) && addr_within(dst, cfg_native4_net, cfg_native4_mask)) {
		return false;
	}
	e = ipcache_of(dst);
	if (cfg_overlay_ifindex && e && (e->flags & IPCACHE_PEER))
		return true;
	if (e && ((!is_world(e->identity) && e->identity < IDENTITY_LOCAL) || !addr_zero(&e->node)))
		return false;
	scratch->prefix.prefixlen = 128;
	scratch->prefix.addr = *dst;
	return !bpf_map_lookup_elem(&lash_ipmasq, &scratch->prefix);
}

static __always_inline bool port_used(__u32 port, enum port_use use)
{
	__u8 *uses = bpf_map_lookup_elem(&lash_ports, &port);

	return uses && (*uses & use);
}

/* socket_has: a socket of the host owns or listens on the tuple of the packet; with nat, on that
 * of the reply to it that would come to address nat and port. */
static __noinline bool socket_has(struct __sk_buff *skb, const struct pkt *p, const struct addr *nat, __be16 port)
{
	const struct addr *remote = nat ? &p->dst : &p->src, *local = nat ?: &p->dst;
	__be16 remote_port = nat ? p->dport : p->sport;
	__u32 zero = 0, size;
	struct scratch *scratch = bpf_map_lookup_elem(&lash_scratch, &zero);
	struct bpf_sock_tuple *t;
	struct bpf_sock *sk;

	if (!scratch)
		return true;
	t = (struct bpf_sock_tuple *)scratch->tuple;
	if (p->proto != IPPROTO_TCP && p->proto != IPPROTO_UDP)
		return false;
	if (!nat)
		port = p->dport;
	if (p->v6) {
		__builtin_memcpy(t->ipv6.saddr, remote, 16);
		__builtin_memcpy(t->ipv6.daddr, local, 16);
		t->ipv6.sport = remote_port;
		t->ipv6.dport = port;
		size = sizeof(t->ipv6);
	} else {
		t->ipv4.saddr = remote->w[3];
		t->ipv4.daddr = local->w[3];
		t->ipv4.sport = remote_port;
		t->ipv4.dport = port;
		size = sizeof(t->ipv4);
	}
	if (p->proto == IPPROTO_TCP)
		sk = bpf_skc_lookup_tcp(skb, t, size, BPF_F_CURRENT_NETNS, 0);
	else
		sk = bpf_sk_lookup_udp(skb, t, size, BPF_F_CURRENT_NETNS, 0);
	if (!sk)
		return false;
	bpf_sk_release(sk);
	return true;
}

/* --- Source ports. Who has a translated tuple has its row of lash_nat. On the node's own addresses the
 * node's sockets take ports, too, without asking: a claim makes its row first and looks for a socket
 * then, while the socket's first packet looks for the row (apart): whoever comes second gives way. Until
 * the claim is sure, its row is pending: answers to a socket that was there first pass. */

/* The first tries are among ports that the node's sockets seldom choose, the others among all. With
 * 97 of 100 ports taken, one connection in a million finds none. */
#define SNAT_NEAR 16
#define SNAT_TRIES 512

/* snat_claimed: somebody has claimed the port on an address of the node, perhaps long ago. */
static __always_inline bool snat_claimed(__u32 port)
{
	__u32 *when = bpf_map_lookup_elem(&lash_snat_ports, &port);

	return when && *when;
}

/* nat_needed: the connection still needs its translated tuple. patient: also after it was closed, until it
 * expires; otherwise as long as packets may be under way. Whoever found it alive just before it expired has
 * a second to go on with it. */
static __always_inline bool nat_needed(const struct conn *c, __u32 now, bool patient)
{
	return c && !past(now, c->expires + cfg_hz) && (patient || !conn_closed(c) || past(c->expires + cfg_hz, now + cfg_ct_close_ticks));
}

/* nat_free takes a translated tuple from a connection that needs it no more. False: somebody has it, or is
 * claiming it. */
static __noinline bool nat_free(struct scratch *scratch, bool patient)
{
	struct conn_key *owner = bpf_map_lookup_elem(&lash_nat, &scratch->nat_key);
	__u32 now = ticks();
	struct conn *c;
	bool is_free;

	if (!owner)
		return true;
	c = bpf_map_lookup_elem(&lash_conn, owner);
	if (owner->pending || nat_needed(c, now, patient))
		return false;
	if (!nat_lock(scratch))
		return false;
	owner = bpf_map_lookup_elem(&lash_nat, &scratch->nat_key);
	c = owner ? bpf_map_lookup_elem(&lash_conn, owner) : NULL;
	is_free = !(owner && owner->pending) && !nat_needed(c, now, patient);
	if (owner && is_free) {
		if (c) { /* what it may still send gets another */
			c->flags &= ~(CONN_NAT | CONN_CLAIMED);
			c->orig.epoch = c->reply.epoch = 0;
		}
		bpf_map_delete_elem(&lash_nat, &scratch->nat_key);
	}
	nat_unlock(scratch);
	return is_free;
}

/* nat_try claims one port on scratch->nat for the connection in scratch->key.
 * 0; 1: somebody has it; a drop reason: there is no room for the row. */
__noinline int nat_try(struct __sk_buff *skb, struct pkt *p, struct conn *c, __u32 number, __u32 patient)
{
	__u32 zero = 0, now = ticks(), *when;
	struct scratch *scratch = bpf_map_lookup_elem(&lash_scratch, &zero);
	struct conn_key *nk, *k, *owner;
	__be16 port = bpf_htons((__u16)number);
	struct conn *other;
	bool own, taken = false;
	long err;

	if (!scratch || !p || !c)
		return -DROP_CT_INSERT;
	nk = &scratch->nat_key;
	k = &scratch->key;
	own = scratch->nat_own;
	if (!own && port_used(number, PORT_FRONTEND))
		return 1;
	conn_key(nk, &scratch->nat, port, &p->dst, p->dport, p->proto);
	owner = bpf_map_lookup_elem(&lash_nat, nk);
	if (owner && (owner->pending || !conn_key_equal(owner, k))) {
		if (!nat_free(scratch, patient))
			return 1;
		owner = NULL;
	}
	if (!owner) {
		k->pending = true;
		err = bpf_map_update_elem(&lash_nat, nk, k, BPF_NOEXIST);
		k->pending = false;
		if (err)
			return err == -EEXIST ? 1 : DROP(p, DROP_CT_INSERT);
	}
	/* The exchange is a barrier, too: the row is there before a socket is looked for.
	 * 0: packets without ports, which from_netdev tells by their protocol. */
	when = bpf_map_lookup_elem(&lash_snat_ports, &number);
	if (!own && when && number)
		__sync_lock_test_and_set(when, now | 1);
	/* The tuple may be that of a connection as it is, or of a socket. */
	other = bpf_map_lookup_elem(&lash_conn, nk);
	if (other && other != c) {
		taken = !past(now, other->expires) && (patient || !conn_closed(other));
		if (!taken) /* answers would find it first */
			bpf_map_delete_elem(&lash_conn, nk);
	}
	if (taken || (!own && socket_has(skb, p, &scratch->nat, port))) {
		bpf_map_delete_elem(&lash_nat, nk);
		return 1;
	}
	owner = bpf_map_lookup_elem(&lash_nat, nk);
	if (!owner || !conn_key_equal(owner, k))
		return 1;
	owner->pending = false;
	c->flags |= CONN_CLAIMED;
	if (own && port == p->sport)
		return 0;
	c->nat_addr = scratch->nat;
	c->nat_port = port;
	c->flags |= CONN_NAT;
	return 0;
}

/* nat_ports: the packet has a source port that translation may change; of an echo request it is the identifier. */
static __always_inline bool nat_ports(const struct pkt *p)
{
	return p->proto == IPPROTO_TCP || p->proto == IPPROTO_UDP ||
	       ((p->flags & PKT_ECHO) && p->icmp_type == (p->v6 ? ICMP6_ECHO : ICMP4_ECHO));
}

/* nat_full notes that no port was found towards the packet's destination; the agent tells who has them.
 * lately: it only looks whether that was so a moment ago. */
static __noinline bool nat_full(struct scratch *scratch, struct pkt *p, bool lately)
{
	struct snat_full_key *key = &scratch->full_key;
	struct snat_full *full = &scratch->full, *row;
	__u32 now = ticks();

	__builtin_memset(key, 0, sizeof(*key));
	key->nat = scratch->nat;
	key->dst = p->dst;
	key->dport = p->dport;
	key->proto = p->proto;
	row = bpf_map_lookup_elem(&lash_snat_full, key);
	if (lately)
		return row && !past(now, row->last + cfg_hz / 4);
	if (row) {
		__sync_fetch_and_add(&row->packets, 1);
		row->last = now;
		return true;
	}
	full->packets = 1;
	full->last = now;
	full->pad = 0;
	bpf_map_update_elem(&lash_snat_full, key, full, BPF_ANY);
	return true;
}

/* nat_claim gives the connection in scratch->key a source port on address nat that nobody else uses
 * towards the packet's destination, and the row of lash_nat. On the packet's own address that is its own
 * port, if it can be. p is translated on the responder's side already. 0 or a drop reason. */
__noinline int nat_claim(struct __sk_buff *skb, struct pkt *p, struct conn *c, struct addr *nat)
{
	__u32 near = cfg_snat_max - cfg_snat_min + 1, all = near, zero = 0;
	struct scratch *scratch = bpf_map_lookup_elem(&lash_scratch, &zero);
	bool ports, opens;
	int err = 1;

	if (!scratch || !p || !c || !nat)
		return -DROP_NAT_EXHAUSTED;
	if (cfg_snat_far_max)
		all += cfg_snat_far_max - cfg_snat_far_min + 1;
	ports = nat_ports(p);
	if (!ports && (p->flags & PKT_PORTS) == 0 && p->proto != IPPROTO_SCTP && p->sport)
		return DROP(p, DROP_NAT_PROTO);
	if ((p->flags & PKT_ECHO) && !ports)
		return DROP(p, DROP_NAT_PROTO); /* a reply that nobody asked for: its identifier is the other side's */
	opens = p->proto == IPPROTO_TCP && tcp_opens(p);
	scratch->nat = *nat;
	/* An address that speaks for itself: a client's or a pod's, and not the node's. */
	scratch->nat_own = addr_equal(nat, &p->src) && !scratch->key.kind && !(c->flags & CONN_HOST);
	if (scratch->nat_own || !ports)
		err = nat_try(skb, p, c, bpf_ntohs(p->sport), 1);
	if (err != 1)
		return err;
#pragma clang loop unroll(disable)
	for (int i = 0; ports && i < SNAT_TRIES; i++) {
		__u32 n;

		if (i == SNAT_NEAR && nat_full(scratch, p, true))
			break; /* a flood towards where nothing is left costs no long search each time */
		n = bpf_get_prandom_u32() % (i < SNAT_NEAR ? near : all);
		n = n < near ? cfg_snat_min + n : cfg_snat_far_min + (n - near);
		err = nat_try(skb, p, c, n, i < SNAT_NEAR || !opens);
		if (err != 1)
			return err;
	}
	nat_full(scratch, p, false);
	return DROP(p, DROP_NAT_EXHAUSTED);
}

/* masquerade decides once a connection whether its source changes when it leaves by
 * this device. 0 or a drop reason. */
static __always_inline int masquerade(struct __sk_buff *skb, struct pkt *p, struct scratch *scratch,
				      struct conn *c, const struct device *dev)
{
	struct addr nat;

	if (c->flags & (CONN_NAT | CONN_NO_NAT))
		return 0;
	if (!leaves_cluster(scratch, p)) {
		c->flags |= CONN_NO_NAT;
		return 0;
	}
	nat = p->v6 ? dev->ip6 : dev->ip4;
	if (addr_zero(&nat))
		return 0;
	return nat_claim(skb, p, c, &nat);
}

/* nat_taken: the tuple of a connection that the node opens is, beyond the node, another's. */
static __always_inline bool nat_taken(const struct conn_key *k)
{
	struct conn_key *owner = bpf_map_lookup_elem(&lash_nat, k);
	struct conn *c;

	if (!owner || conn_key_equal(owner, k))
		return false;
	c = bpf_map_lookup_elem(&lash_conn, owner);
	return owner->pending || nat_needed(c, ticks(), true);
}

/* apart keeps a connection of the node itself off the tuple of a translated one: it is translated to
 * another port. Its record has a key of its own kind, so that the tuple leads where it led before. */
static __noinline int apart(struct __sk_buff *skb, struct pkt *p)
{
	__u32 zero = 0, now = ticks();
	struct scratch *scratch = bpf_map_lookup_elem(&lash_scratch, &zero);
	struct conn *c;
	bool from_hi;
	int err;

	/* What has no port cannot have another: neighbour discovery, above all. */
	if (!scratch || !nat_ports(p))
		return VERDICT_OK;
	from_hi = pkt_key(&scratch->key, p);
	scratch->nat_key = scratch->key;
	scratch->key.kind = KEY_NODE;
	c = bpf_map_lookup_elem(&lash_conn, &scratch->key);
	if (!c || past(now, c->expires) || (tcp_opens(p) && conn_closed(c))) {
		/* What goes on began with this tuple: its socket was there before any claim. */
		if (p->proto == IPPROTO_TCP && !tcp_opens(p))
			return VERDICT_OK;
		/* From here on the tuple is the node's own, for packets and answers: no row leads them elsewhere. */
		if (nat_free(scratch, true)) {
			if (c)
				bpf_map_delete_elem(&lash_conn, &scratch->key);
			return VERDICT_OK;
		}
		err = conn_open(p, scratch, from_hi);
		if (err)
			return err;
		c = bpf_map_lookup_elem(&lash_conn, &scratch->key);
		if (!c)
			return DROP(p, DROP_CT_INSERT);
	}
	if (!(c->flags & CONN_NAT)) {
		struct addr nat = p->src;

		err = nat_claim(skb, p, c, &nat);
		if (err)
			return err;
	}
	conn_see(c, &c->orig, p, true, skb->len, now);
	if (nat_apply(skb, p, c, &scratch->key, DIR_TO_NAT))
		return DROP(p, DROP_WRITE);
	skb->mark = (skb->mark & ~MARK_MASK) | MARK_DONE;
	count(HOOK_NETDEV_OUT, SLOW_MASQUERADE, skb->len);
	return VERDICT_OK;
}

#undef FILE_ID
#endif
