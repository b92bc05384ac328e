/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* Masquerading: which packets, which source port, and the rewriting. A masqueraded
 * connection is one record; the translated tuple leads to it through lash_nat. */
#ifndef LASH_NAT_H
#define LASH_NAT_H

#include "conn.h"

#define FILE_ID FILE_NAT

enum identity {
	IDENTITY_UNKNOWN = 0, IDENTITY_HOST = 1, IDENTITY_WORLD = 2, IDENTITY_REMOTE_NODE = 6,
	IDENTITY_WORLD_IPV4 = 9, IDENTITY_WORLD_IPV6 = 10, /* the world, on nodes with both families */
	IDENTITY_LOCAL = 1 << 24, /* from here on this node's own: CIDRs outside of the cluster */
};

static __always_inline bool is_world(__u32 identity)
{
	return identity == IDENTITY_WORLD || identity == IDENTITY_WORLD_IPV4 || identity == IDENTITY_WORLD_IPV6;
}

/* l4_checksum: where the packet's L4 checksum is, and whether it covers the addresses. */
static __always_inline __u32 l4_checksum(const struct pkt *p, __u64 *flags)
{
	switch (p->proto) {
	case IPPROTO_TCP:
		*flags = BPF_F_PSEUDO_HDR;
		return p->l4 + 16;
	case IPPROTO_UDP:
		*flags = BPF_F_PSEUDO_HDR | BPF_F_MARK_MANGLED_0;
		return p->l4 + 6;
	case IPPROTO_ICMPV6:
		*flags = BPF_F_PSEUDO_HDR;
		return p->l4 + 2;
	case IPPROTO_ICMP:
		*flags = 0;
		return p->l4 + 2;
	}
	return 0;
}

/* l4_csum_address6: a change of an IPv6 address in the L4 checksum that covers it. The kernel
 * takes it off the device's sum of the packet too, as IPv4 needs it, whose header sums to
 * nothing; here the address itself stays in that sum. 0, or -1. */
static __always_inline int l4_csum_address6(struct __sk_buff *skb, __u32 off, __s64 diff, __u64 flags)
{
	if (bpf_l4_csum_replace(skb, off, 0, diff, flags))
		return -1;
	bpf_csum_update(skb, diff);
	return 0;
}

/* nat_rewrite replaces the source (or destination) address and port. SCTP keeps its
 * ports: its checksum covers the payload. 0, or -1 when the packet cannot be written. */
static __always_inline int nat_rewrite(struct __sk_buff *skb, const struct pkt *p, bool source,
				       const struct addr *from, __be16 from_port,
				       const struct addr *to, __be16 to_port)
{
	__u64 flags = 0;
	__u32 sum = p->flags & PKT_LATER ? 0 : l4_checksum(p, &flags);
	__u32 port_off = 0;
	struct addr old = *from, new = *to;
	__u64 store = 0;
	__be16 check;

	if (p->proto == IPPROTO_UDP && sum) {
		if (bpf_skb_load_bytes(skb, sum, &check, sizeof(check)))
			return -1;
		if (!check)
			sum = 0; /* the sender left it out */
	}
	/* What no checksum of the packet makes up for changes the device's sum of it. */
	if (!sum)
		store = BPF_F_RECOMPUTE_CSUM;

	if (!(p->flags & PKT_LATER) && from_port != to_port) {
		if (p->flags & PKT_ECHO)
			port_off = p->l4 + 4;
		else if (p->proto == IPPROTO_TCP || p->proto == IPPROTO_UDP)
			port_off = p->l4 + (source ? 0 : 2);
	}
	if (port_off) {
		if (sum && bpf_l4_csum_replace(skb, sum, from_port, to_port, (flags & ~BPF_F_PSEUDO_HDR) | sizeof(to_port)))
			return -1;
		if (bpf_skb_store_bytes(skb, port_off, &to_port, sizeof(to_port), store))
			return -1;
	}
	if (p->v6) {
		__s64 diff = bpf_csum_diff(&old, 16, &new, 16, 0);

		if (sum && l4_csum_address6(skb, sum, diff, flags))
			return -1;
		if (bpf_skb_store_bytes(skb, ETH_HLEN + (source ? offsetof(struct ipv6hdr, saddr) :
					offsetof(struct ipv6hdr, daddr)), &new, 16, store))
			return -1;
		return 0;
	}
	if (sum && (flags & BPF_F_PSEUDO_HDR) &&
	    bpf_l4_csum_replace(skb, sum, old.w[3], new.w[3], flags | sizeof(__be32)))
		return -1;
	if (bpf_l3_csum_replace(skb, ETH_HLEN + offsetof(struct iphdr, check), old.w[3], new.w[3], sizeof(__be32)) ||
	    bpf_skb_store_bytes(skb, ETH_HLEN + (source ? offsetof(struct iphdr, saddr) :
				offsetof(struct iphdr, daddr)), &new.w[3], sizeof(__be32), 0))
		return -1;
	return 0;
}

/* nat_apply translates a packet of connection k as its direction's flags say. */
static __noinline int nat_apply(struct __sk_buff *skb, const struct pkt *p, const struct conn *c,
				const struct conn_key *k, __u32 flags)
{
	bool hi = c->flags & CONN_INITIATOR_HI;

	if (flags & DIR_TO_NAT)
		return nat_rewrite(skb, p, true, &p->src, p->sport, &c->nat_addr, c->nat_port);
	return nat_rewrite(skb, p, false, &p->dst, p->dport, hi ? &k->hi : &k->lo, hi ? k->hi_port : k->lo_port);
}

/* ipcache_of: what is known of an address, by the longest prefix; NULL: nothing. */
static __always_inline struct ipcache_entry *ipcache_of(const struct addr *a)
{
	struct ipcache_key key = { .prefixlen = 128, .addr = *a };

	return bpf_map_lookup_elem(&lash_ipcache, &key);
}

/* leaves_cluster: the destination is neither inside the native routing CIDR nor
 * known as a node or as a pod somewhere. In tunnel mode the network does not know
 * pods, and other nodes expect them from the tunnel: there, nodes are outside, too. */
static __always_inline bool leaves_cluster(const struct pkt *p, const struct addr *dst)
{
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
	return !e || ((is_world(e->identity) || e->identity >= IDENTITY_LOCAL) && addr_zero(&e->node)) ||
	       (cfg_overlay_ifindex && (e->flags & IPCACHE_PEER));
}

/* socket_has: a socket of the host owns or listens on the tuple that a reply would carry. */
static __noinline bool socket_has(struct __sk_buff *skb, const struct pkt *p,
				       const struct addr *nat, __be16 port)
{
	__u32 zero = 0, size;
	struct scratch *scratch = bpf_map_lookup_elem(&lash_scratch, &zero);
	struct bpf_sock_tuple *t;
	struct bpf_sock *sk;

	if (!scratch)
		return true;
	t = (struct bpf_sock_tuple *)scratch->tuple;
	if (p->proto != IPPROTO_TCP && p->proto != IPPROTO_UDP)
		return false;
	if (p->v6) {
		__builtin_memcpy(t->ipv6.saddr, &p->dst, 16);
		__builtin_memcpy(t->ipv6.daddr, nat, 16);
		t->ipv6.sport = p->dport;
		t->ipv6.dport = port;
		size = sizeof(t->ipv6);
	} else {
		t->ipv4.saddr = p->dst.w[3];
		t->ipv4.daddr = nat->w[3];
		t->ipv4.sport = p->dport;
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

#define SNAT_TRIES 16

/* nat_claim gives the connection a source port on address nat that nobody else uses
 * towards this destination. k is the packet's own key. 0 or a drop reason. */
static __noinline int nat_claim(struct __sk_buff *skb, struct pkt *p, struct conn_key *k,
				struct conn *c, struct addr *nat)
{
	__u32 span = cfg_snat_max - cfg_snat_min + 1, start, now = ticks();
	bool request = (p->flags & PKT_ECHO) && p->icmp_type == (p->v6 ? ICMP6_ECHO : ICMP4_ECHO);
	bool ports = p->proto == IPPROTO_TCP || p->proto == IPPROTO_UDP || request;
	struct scratch *scratch;
	struct conn_key *nk;
	__u32 zero = 0;

	scratch = bpf_map_lookup_elem(&lash_scratch, &zero);
	if (!scratch)
		return DROP(p, DROP_NAT_EXHAUSTED);
	nk = &scratch->nat_key;
	if (!ports && (p->flags & PKT_PORTS) == 0 && p->proto != IPPROTO_SCTP && p->sport)
		return DROP(p, DROP_NAT_PROTO);
	if ((p->flags & PKT_ECHO) && !request)
		return DROP(p, DROP_NAT_PROTO); /* a reply that nobody asked for: its identifier is the other side's */
	start = bpf_get_prandom_u32();
	for (int i = 0; i < SNAT_TRIES; i++) {
		__be16 port = ports ? bpf_htons((__u16)(cfg_snat_min + (start + i * 7919) % span)) : p->sport;
		struct conn_key *owner;

		if (socket_has(skb, p, nat, port))
			continue;
		conn_key(nk, nat, port, &p->dst, p->dport, p->proto);
		if (bpf_map_update_elem(&lash_nat, nk, k, BPF_NOEXIST)) {
			struct conn *other;

			/* Taken: free after all if its connection is gone or expired. */
			owner = bpf_map_lookup_elem(&lash_nat, nk);
			if (owner) {
				other = bpf_map_lookup_elem(&lash_conn, owner);
				if (other && other != c && !past(now, other->expires))
					continue;
			}
			if (bpf_map_update_elem(&lash_nat, nk, k, BPF_ANY))
				continue;
		}
		c->nat_addr = *nat;
		c->nat_port = port;
		c->flags |= CONN_NAT;
		return 0;
	}
	return DROP(p, DROP_NAT_EXHAUSTED);
}

/* masquerade decides once a connection whether its source changes when it leaves by
 * this device. 0 or a drop reason. */
static __always_inline int masquerade(struct __sk_buff *skb, struct pkt *p, struct conn_key *k,
				      struct conn *c, const struct device *dev)
{
	struct addr nat;

	if (c->flags & (CONN_NAT | CONN_NO_NAT))
		return 0;
	if (!leaves_cluster(p, &p->dst)) {
		c->flags |= CONN_NO_NAT;
		return 0;
	}
	nat = p->v6 ? dev->ip6 : dev->ip4;
	if (addr_zero(&nat))
		return 0;
	return nat_claim(skb, p, k, c, &nat);
}

/* --- ICMP errors about masqueraded packets ------------------------------- */

struct inner {
	struct addr src, dst;
	__be16 sport, dport;
	__u8 proto;
	bool to_pod;             /* the error comes from outside */
	__u16 l3, l4;            /* offsets from the frame's start */
	__u16 port_off;          /* of sport; 0: no ports (dport is 2 further on) */
	bool echo;
};

/* inner_parse reads the headers an ICMP error quotes. 0 or a drop reason. */
static __always_inline int inner_parse(struct __sk_buff *skb, struct pkt *p, struct inner *in)
{
	__be16 ports[4] = {};

	_Static_assert(sizeof(*in) <= sizeof(((struct scratch *)0)->inner), "struct inner outgrew its place in struct scratch");
	__builtin_memset(in, 0, sizeof(*in));
	in->l3 = p->l4 + 8;
	if (p->v6) {
		_Static_assert(offsetof(struct inner, dst) == 16, "src and dst are read as one");
		if (bpf_skb_load_bytes(skb, in->l3 + offsetof(struct ipv6hdr, saddr), &in->src, 32) ||
		    bpf_skb_load_bytes(skb, in->l3 + offsetof(struct ipv6hdr, nexthdr), &in->proto, 1))
			return DROP(p, DROP_CT_INVALID);
		in->l4 = in->l3 + sizeof(struct ipv6hdr);
	} else {
		struct iphdr ip;

		if (bpf_skb_load_bytes(skb, in->l3, &ip, sizeof(ip)))
			return DROP(p, DROP_CT_INVALID);
		addr_from4(&in->src, ip.saddr);
		addr_from4(&in->dst, ip.daddr);
		in->proto = ip.protocol;
		in->l4 = in->l3 + ip.ihl * 4;
		if (ip.frag_off & bpf_htons(IPV4_OFFSET))
			return 0;
	}
	if (bpf_skb_load_bytes(skb, in->l4, ports, 8))
		return 0;
	switch (in->proto) {
	case IPPROTO_TCP:
	case IPPROTO_UDP:
	case IPPROTO_SCTP:
		in->sport = ports[0];
		in->dport = ports[1];
		in->port_off = in->l4;
		break;
	case IPPROTO_ICMP:
	case IPPROTO_ICMPV6: {
		__u8 type = ((__u8 *)ports)[0];

		if (type == ICMP4_ECHO || type == ICMP6_ECHO)
			in->sport = ports[2];
		else
			in->dport = ports[2];
		in->port_off = in->l4 + 4;
		in->echo = true;
		break;
	}
	}
	return 0;
}

/* icmp_put changes an address (4 or 16 bytes) in an ICMP error and the error's checksum with it.
 * flags: BPF_F_PSEUDO_HDR for an address that the checksum covers without containing it. */
static __always_inline int icmp_put(struct __sk_buff *skb, const struct pkt *p, __u32 off,
				    const void *from, const void *to, const __u32 size, __u64 flags)
{
	__s64 diff = bpf_csum_diff((void *)from, size, (void *)to, size, 0);

	if (flags & BPF_F_PSEUDO_HDR ? l4_csum_address6(skb, p->l4 + 2, diff, flags) : bpf_l4_csum_replace(skb, p->l4 + 2, 0, diff, 0))
		return -1;
	return bpf_skb_store_bytes(skb, off, to, size, 0) ? -1 : 0;
}

/* icmp_put16 changes a port or a checksum that an ICMP error quotes. */
static __always_inline int icmp_put16(struct __sk_buff *skb, const struct pkt *p, __u32 off, __be16 from, __be16 to)
{
	return bpf_l4_csum_replace(skb, p->l4 + 2, from, to, sizeof(to)) ||
	       bpf_skb_store_bytes(skb, off, &to, sizeof(to), 0) ? -1 : 0;
}

/* icmp_translate rewrites an ICMP error about a masqueraded packet. in->to_pod: the quoted packet's source and the error's destination become the
 * pod's. Otherwise a pod reports about a reply: the other way round. */
static __noinline int icmp_translate(struct __sk_buff *skb, struct pkt *p, struct inner *in,
				     struct addr *addr, __be16 port)
{
	const struct addr *old_outer = in->to_pod ? &p->dst : &p->src;
	const struct addr *old_inner = in->to_pod ? &in->src : &in->dst;
	__be16 old_port = in->to_pod ? in->sport : in->dport;

	if (p->v6) {
		__u32 outer = ETH_HLEN + (in->to_pod ? offsetof(struct ipv6hdr, daddr) : offsetof(struct ipv6hdr, saddr));
		__u32 inner = in->l3 + (in->to_pod ? offsetof(struct ipv6hdr, saddr) : offsetof(struct ipv6hdr, daddr));

		if (icmp_put(skb, p, outer, old_outer, addr, 16, BPF_F_PSEUDO_HDR) ||
		    icmp_put(skb, p, inner, old_inner, addr, 16, 0))
			return DROP(p, DROP_WRITE);
	} else {
		__u32 outer = ETH_HLEN + (in->to_pod ? offsetof(struct iphdr, daddr) : offsetof(struct iphdr, saddr));
		__u32 inner = in->l3 + (in->to_pod ? offsetof(struct iphdr, saddr) : offsetof(struct iphdr, daddr));
		__u16 check;
		__u32 sum;

		if (bpf_l3_csum_replace(skb, ETH_HLEN + offsetof(struct iphdr, check), old_outer->w[3], addr->w[3], 4) ||
		    bpf_skb_store_bytes(skb, outer, &addr->w[3], 4, 0) ||
		    icmp_put(skb, p, inner, &old_inner->w[3], &addr->w[3], 4, 0))
			return DROP(p, DROP_WRITE);
		/* The quoted header's own checksum, so that the receiver finds it sound. */
		if (bpf_skb_load_bytes(skb, in->l3 + offsetof(struct iphdr, check), &check, sizeof(check)))
			return DROP(p, DROP_WRITE);
		sum = (__u16)~check + (__u16)~(old_inner->w[3] & 0xffff) + (__u16)~(old_inner->w[3] >> 16) +
		      (addr->w[3] & 0xffff) + (addr->w[3] >> 16);
		sum = (sum & 0xffff) + (sum >> 16);
		sum = (sum & 0xffff) + (sum >> 16);
		if (icmp_put16(skb, p, in->l3 + offsetof(struct iphdr, check), check, (__u16)~sum))
			return DROP(p, DROP_WRITE);
	}
	if (in->port_off && old_port != port && in->proto != IPPROTO_SCTP) {
		__u32 off = in->port_off + (in->to_pod || in->echo ? 0 : 2);

		if (icmp_put16(skb, p, off, old_port, port))
			return DROP(p, DROP_WRITE);
	}
	return 0;
}

/* translate_report gives a pod's error about what reached it by way of a masqueraded connection the
 * addresses of outside, and sets PKT_TRANSLATED. 0, also for an error about something else, or a drop reason. */
static __noinline int translate_report(struct __sk_buff *skb, struct pkt *p)
{
	__u32 zero = 0;
	struct scratch *scratch = bpf_map_lookup_elem(&lash_scratch, &zero);
	struct conn_key *k;
	struct inner *in;
	struct conn *c;
	bool from_hi;
	int err;

	if (!scratch)
		return DROP(p, DROP_CT_INVALID);
	k = &scratch->nat_key;
	in = (struct inner *)scratch->inner;
	err = inner_parse(skb, p, in);
	if (err)
		return err;
	from_hi = conn_key(k, &in->src, in->sport, &in->dst, in->dport, in->proto);
	c = bpf_map_lookup_elem(&lash_conn, k);
	if (!c || !(c->flags & CONN_NAT) || conn_from_initiator(c, from_hi))
		return 0;
	p->flags |= PKT_TRANSLATED;
	return icmp_translate(skb, p, in, &c->nat_addr, c->nat_port);
}

#undef FILE_ID
#endif
