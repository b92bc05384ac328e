/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* Translation: the rewriting of packets and of the ICMP errors about them. A translated
 * connection is one record; the translated tuple leads to it through lash_nat. What is
 * translated, and to which source port, is in snat.h. */
#ifndef LASH_NAT_H
#define LASH_NAT_H

#include "conn.h"

#define FILE_ID FILE_NAT

enum identity {
	IDENTITY_UNKNOWN = 0, IDENTITY_HOST = 1, IDENTITY_WORLD = 2, IDENTITY_REMOTE_NODE = 6, IDENTITY_APISERVER = 7,
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

/* nat_rewrite replaces the source (or destination) address and port of the packet, and p follows.
 * SCTP keeps its ports: its checksum covers the payload. 0, or -1 when the packet cannot be written. */
static __always_inline int nat_rewrite(struct __sk_buff *skb, struct pkt *p, bool source, const struct addr *to, __be16 to_port)
{
	struct addr *side = source ? &p->src : &p->dst;
	__be16 *port = source ? &p->sport : &p->dport, from_port = *port;
	__u64 flags = 0;
	__u32 sum = p->flags & PKT_LATER ? 0 : l4_checksum(p, &flags);
	__u32 port_off = 0;
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
	*port = to_port;
	if (port_off) {
		if (sum && bpf_l4_csum_replace(skb, sum, from_port, to_port, (flags & ~BPF_F_PSEUDO_HDR) | sizeof(to_port)))
			return -1;
		if (bpf_skb_store_bytes(skb, port_off, &to_port, sizeof(to_port), store))
			return -1;
	}
	if (p->v6) {
		__s64 diff = bpf_csum_diff(side->w, 16, (void *)to->w, 16, 0);

		if (sum && l4_csum_address6(skb, sum, diff, flags))
			return -1;
		if (bpf_skb_store_bytes(skb, ETH_HLEN + (source ? offsetof(struct ipv6hdr, saddr) :
					offsetof(struct ipv6hdr, daddr)), to, 16, store))
			return -1;
	} else {
		if (sum && (flags & BPF_F_PSEUDO_HDR) &&
		    bpf_l4_csum_replace(skb, sum, side->w[3], to->w[3], flags | sizeof(__be32)))
			return -1;
		if (bpf_l3_csum_replace(skb, ETH_HLEN + offsetof(struct iphdr, check), side->w[3], to->w[3], sizeof(__be32)) ||
		    bpf_skb_store_bytes(skb, ETH_HLEN + (source ? offsetof(struct iphdr, saddr) :
					offsetof(struct iphdr, daddr)), &to->w[3], sizeof(__be32), 0))
			return -1;
	}
	*side = *to;
	return 0;
}

/* nat_side is what a side of a packet of connection k becomes, as its direction's flags say: the initiator's, or the
 * responder's. False: it stays as it is. source: it is the packet's source. */
static __always_inline bool nat_side(const struct pkt *p, const struct conn *c, const struct conn_key *k, __u32 flags, bool responder,
				     bool *source, const struct addr **to, __be16 *to_port)
{
	bool forth = flags & DIR_TO_NAT;

	*source = responder != forth;
	if (flags & DIR_DSR ? !responder : !(c->flags & (responder ? CONN_DNAT : CONN_NAT)))
		return false;
	if (forth) {
		*to = responder ? &c->to_addr : &c->nat_addr;
		*to_port = responder ? c->to_port : c->nat_port;
	} else if (flags & DIR_DSR) {
		*to = &c->to_addr;
		*to_port = c->to_port;
	} else if (responder) {
		*to = conn_responder(c, k, to_port);
	} else {
		*to = conn_initiator(c, k, to_port);
	}
	return !addr_equal(*to, *source ? &p->src : &p->dst) || *to_port != (*source ? p->sport : p->dport);
}

/* nat_tuple gives p, of a packet of connection k, the tuple that its direction's flags say. */
static __always_inline void nat_tuple(struct pkt *p, const struct conn *c, const struct conn_key *k, __u32 flags)
{
	if (flags & DIR_TO_NAT) {
		if (c->flags & CONN_NAT) {
			p->src = c->nat_addr;
			p->sport = c->nat_port;
		}
		if (c->flags & CONN_DNAT) {
			p->dst = c->to_addr;
			p->dport = c->to_port;
		}
	} else if (flags & DIR_DSR) {
		p->src = c->to_addr;
		p->sport = c->to_port;
	} else {
		if (c->flags & CONN_NAT)
			p->dst = *conn_initiator(c, k, &p->dport);
		if (c->flags & CONN_DNAT)
			p->src = *conn_responder(c, k, &p->sport);
	}
}

/* A checksum follows what it covers (RFC 1624): csum_follow sums up by how much that grows, in words of the packet's own
 * order, of 32 or 16 bits. */
static __always_inline void csum_follow(__u64 *diff, __u32 from, __u32 to)
{
	*diff += (__u64)(__u32)~from + to;
}

static __always_inline __u32 csum_fold(__u64 diff)
{
	diff = (diff & 0xffffffff) + (diff >> 32);
	return (diff & 0xffffffff) + (diff >> 32);
}

static __always_inline __u16 csum_apply(__u16 check, __u64 diff)
{
	__u64 sum = (__u16)~check + (__u64)csum_fold(diff);

	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	return ~sum;
}

/* nat_write_addrs writes p's addresses over those of the IP header at l3, and IPv4's checksum. By how much they grow. Both
 * sides, at fixed offsets: what stays adds nothing. */
static __always_inline __u64 nat_write_addrs(void *l3, const struct pkt *p, bool v6)
{
	__u64 diff = 0;

	if (v6) {
		struct ipv6hdr *ip = l3;
		__u32 *src = (__u32 *)&ip->saddr, *dst = (__u32 *)&ip->daddr;

#pragma clang loop unroll(full)
		for (int w = 0; w < 4; w++) {
			csum_follow(&diff, src[w], p->src.w[w]);
			csum_follow(&diff, dst[w], p->dst.w[w]);
			src[w] = p->src.w[w];
			dst[w] = p->dst.w[w];
		}
	} else {
		struct iphdr *ip = l3;

		csum_follow(&diff, ip->saddr, p->src.w[3]);
		csum_follow(&diff, ip->daddr, p->dst.w[3]);
		ip->saddr = p->src.w[3];
		ip->daddr = p->dst.w[3];
		ip->check = csum_apply(ip->check, diff);
	}
	return diff;
}

/* nat_write_ports does the same for the ports. */
static __always_inline __u64 nat_write_ports(__be16 *port, const struct pkt *p)
{
	__u64 diff = 0;

	csum_follow(&diff, port[0], p->sport);
	csum_follow(&diff, port[1], p->dport);
	port[0] = p->sport;
	port[1] = p->dport;
	return diff;
}

#define NAT_OTHER 1 /* nat_plain: the packet is not plain */

/* nat_plain is nat_apply for what most packets are: TCP, or UDP with a checksum, without options. 0, -1, or NAT_OTHER. */
static __always_inline int nat_plain(struct __sk_buff *skb, struct pkt *p, const struct conn *c, const struct conn_key *k, __u32 flags, bool v6)
{
	void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
	void *l4 = data + (v6 ? HEADERS6 : HEADERS4);
	__u64 covers = 0, addrs, ports;
	__u32 sum = l4_checksum(p, &covers);

	if ((p->proto != IPPROTO_TCP && p->proto != IPPROTO_UDP) || (p->flags & PKT_LATER) || p->l4 != (v6 ? HEADERS6 : HEADERS4) ||
	    l4 + L4_SHORT > end || (p->proto == IPPROTO_UDP && !((__u16 *)l4)[3]))
		return NAT_OTHER;
	nat_tuple(p, c, k, flags);
	addrs = nat_write_addrs(data + ETH_HLEN, p, v6);
	ports = nat_write_ports(l4, p);
	/* The kernel knows whether the checksum is there already, or the device's to make. */
	if (bpf_l4_csum_replace(skb, sum, 0, csum_fold(ports), covers & ~BPF_F_PSEUDO_HDR))
		return -1;
	return (v6 ? l4_csum_address6(skb, sum, csum_fold(addrs), covers) : bpf_l4_csum_replace(skb, sum, 0, csum_fold(addrs), covers)) ? -1 : 0;
}

/* nat_apply translates a packet of connection k as its direction's flags say, and p with it:
 * what has been translated already is left as it is. 0, or -1 when it cannot be written. */
__noinline int nat_apply(struct __sk_buff *skb, struct pkt *p, struct conn *c, struct conn_key *k, __u32 flags)
{
	int err;

	if (!p || !c || !k || !(flags & (DIR_TO_NAT | DIR_NO_NAT | DIR_DSR)))
		return 0;
	err = p->v6 ? nat_plain(skb, p, c, k, flags, true) : nat_plain(skb, p, c, k, flags, false);
	if (likely(err != NAT_OTHER))
		return err;
#pragma clang loop unroll(disable)
	for (int i = 0; i < 2; i++) {
		const struct addr *to;
		__be16 port;
		bool source;

		/* First the initiator's side, then the responder's. */
		if (nat_side(p, c, k, flags, i, &source, &to, &port) && nat_rewrite(skb, p, source, to, port))
			return -1;
	}
	return 0;
}

/* nat_flags: how packets of a direction of the connection are translated. */
static __always_inline __u8 nat_flags(const struct conn *c, bool orig)
{
	if (c->flags & (CONN_NAT | CONN_DNAT))
		return orig ? DIR_TO_NAT : DIR_NO_NAT;
	return (c->flags & CONN_DSR) && !orig ? DIR_DSR : 0; /* here are the backends */
}

/* ipcache_of: what is known of an address, by the longest prefix; NULL: nothing. */
static __always_inline struct ipcache_entry *ipcache_of(const struct addr *a)
{
	struct ipcache_key key = { .prefixlen = 128, .addr = *a };

	return bpf_map_lookup_elem(&lash_ipcache, &key);
}

/* --- ICMP errors about translated packets -------------------------------- */

struct inner {
	struct addr src, dst;
	__be16 sport, dport;
	__u8 proto;
	bool forth;              /* the quoted packet is not translated, and is to be */
	__u16 l3, l4;            /* offsets from the frame's start */
	__u16 port_off;          /* of sport; 0: no ports (dport is 2 further on) */
	bool echo;
	bool orig;               /* the quoted packet is the initiator's */
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

/* icmp_side gives one end of the quoted packet, and the end of the error that is the same, another
 * address and port. source: the quoted packet's source, which is where the error goes. */
static __always_inline int icmp_side(struct __sk_buff *skb, struct pkt *p, struct inner *in, bool source,
				     const struct addr *to, __be16 to_port)
{
	struct addr *old = source ? &in->src : &in->dst, *outer = source ? &p->dst : &p->src;
	__be16 old_port = source ? in->sport : in->dport;
	bool whole = addr_equal(outer, old); /* not a router's error */
	__u32 off;

	if (p->v6) {
		if (whole) {
			off = ETH_HLEN + (source ? offsetof(struct ipv6hdr, daddr) : offsetof(struct ipv6hdr, saddr));
			if (icmp_put(skb, p, off, outer, to, 16, BPF_F_PSEUDO_HDR))
				return -1;
		}
		off = in->l3 + (source ? offsetof(struct ipv6hdr, saddr) : offsetof(struct ipv6hdr, daddr));
		if (icmp_put(skb, p, off, old, to, 16, 0))
			return -1;
	} else {
		__u16 check;
		__u32 sum;

		if (whole) {
			off = ETH_HLEN + (source ? offsetof(struct iphdr, daddr) : offsetof(struct iphdr, saddr));
			if (bpf_l3_csum_replace(skb, ETH_HLEN + offsetof(struct iphdr, check), outer->w[3], to->w[3], 4) ||
			    bpf_skb_store_bytes(skb, off, &to->w[3], 4, 0))
				return -1;
		}
		off = in->l3 + (source ? offsetof(struct iphdr, saddr) : offsetof(struct iphdr, daddr));
		if (icmp_put(skb, p, off, &old->w[3], &to->w[3], 4, 0))
			return -1;
		/* The quoted header's own checksum, so that the receiver finds it sound. */
		off = in->l3 + offsetof(struct iphdr, check);
		if (bpf_skb_load_bytes(skb, off, &check, sizeof(check)))
			return -1;
		sum = (__u16)~check + (__u16)~(old->w[3] & 0xffff) + (__u16)~(old->w[3] >> 16) +
		      (to->w[3] & 0xffff) + (to->w[3] >> 16);
		sum = (sum & 0xffff) + (sum >> 16);
		sum = (sum & 0xffff) + (sum >> 16);
		if (icmp_put16(skb, p, off, check, (__u16)~sum))
			return -1;
	}
	if (in->port_off && old_port != to_port && in->proto != IPPROTO_SCTP) {
		if (icmp_put16(skb, p, in->port_off + (source || in->echo ? 0 : 2), old_port, to_port))
			return -1;
	}
	if (whole)
		*outer = *to;
	return 0;
}

/* icmp_translate rewrites an ICMP error about a packet of connection k, translated or not, to the other form. */
static __noinline int icmp_translate(struct __sk_buff *skb, struct pkt *p, struct inner *in,
				     const struct conn *c, const struct conn_key *k)
{
#pragma clang loop unroll(disable)
	for (int i = 0; i < 2; i++) {
		bool source = !i, responder = source != in->orig;
		const struct addr *to;
		__be16 port;

		if (!(c->flags & (responder ? CONN_DNAT | CONN_DSR : CONN_NAT)))
			continue;
		if (in->forth) { /* also what a backend says that answers by itself: the client knows to_addr */
			to = responder ? &c->to_addr : &c->nat_addr;
			port = responder ? c->to_port : c->nat_port;
		} else {
			to = responder ? conn_responder(c, k, &port) : conn_initiator(c, k, &port);
		}
		if (icmp_side(skb, p, in, source, to, port))
			return DROP(p, DROP_WRITE);
	}
	p->flags |= PKT_TRANSLATED;
	return 0;
}

/* icmp_owner finds the translated connection that the ICMP error with the quoted packet in scratch->inner
 * is about; its key is then in scratch->nat_key. NULL: it is about something else. */
static __noinline struct conn *icmp_owner(struct scratch *scratch)
{
	struct inner *in = (struct inner *)scratch->inner;
	struct conn_key *k = &scratch->nat_key, *owner;
	const struct addr *from;
	struct conn *c;
	__be16 port;

	in->orig = conn_key(k, &in->src, in->sport, &in->dst, in->dport, in->proto);
	c = bpf_map_lookup_elem(&lash_conn, k);
	if (c) {
		in->forth = true;
		in->orig = conn_from_initiator(c, in->orig);
		/* The network knows no answers of a backend under its own name. */
		return c->flags & (CONN_NAT | CONN_DNAT) || (c->flags & CONN_DSR && in->orig) ? c : NULL;
	}
	owner = bpf_map_lookup_elem(&lash_nat, k);
	if (!owner)
		return NULL;
	*k = *owner;
	c = bpf_map_lookup_elem(&lash_conn, k);
	if (!c)
		return NULL;
	in->forth = false;
	from = &c->nat_addr;
	port = c->nat_port;
	if (!(c->flags & CONN_NAT))
		from = conn_initiator(c, k, &port);
	in->orig = addr_equal(&in->src, from) && in->sport == port;
	return c;
}

/* translate_report gives an error about what came by way of a translated connection the addresses that
 * the other end knows. masqueraded: also when only masquerading translates it.
 * 0, also for an error about something else, or a drop reason. */
__noinline int translate_report(struct __sk_buff *skb, struct pkt *p, __u32 masqueraded)
{
	__u32 zero = 0;
	struct scratch *scratch = bpf_map_lookup_elem(&lash_scratch, &zero);
	struct conn *c;
	int err;

	if (!scratch || !p)
		return -DROP_CT_INVALID;
	err = inner_parse(skb, p, (struct inner *)scratch->inner);
	if (err)
		return err;
	c = icmp_owner(scratch);
	if (!c || (!masqueraded && !(c->flags & (CONN_DNAT | CONN_DSR))))
		return 0;
	return icmp_translate(skb, p, (struct inner *)scratch->inner, c, &scratch->nat_key);
}

#undef FILE_ID
#endif
