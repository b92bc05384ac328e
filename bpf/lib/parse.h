/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* A packet is parsed once, into struct pkt on the stack. */
#ifndef LASH_PARSE_H
#define LASH_PARSE_H

#include "drop.h"

#define FILE_ID FILE_PARSE

#define IPV4_MF     0x2000
#define IPV4_DF     0x4000
#define IPV4_OFFSET 0x1fff

/* As much as a frame without options or extension headers has before L4. */
#define HEADERS4 (ETH_HLEN + sizeof(struct iphdr))
#define HEADERS6 (ETH_HLEN + sizeof(struct ipv6hdr))

#define TCP_FIN 0x01
#define TCP_SYN 0x02
#define TCP_RST 0x04
#define TCP_ACK 0x10

enum icmp_types {
	ICMP4_ECHO_REPLY = 0, ICMP4_UNREACHABLE = 3, ICMP4_ECHO = 8, ICMP4_TIME_EXCEEDED = 11, ICMP4_PARAMETER = 12,
	ICMP6_ERROR_MAX = 127, ICMP6_ECHO = 128, ICMP6_ECHO_REPLY = 129,
	ICMP6_RS = 133, ICMP6_NS = 135, ICMP6_NA = 136, ICMP6_REDIRECT = 137, ICMP6_MLD2 = 143,
};

enum pkt_flags {
	PKT_FRAGMENT   = 1,  /* any fragment */
	PKT_LATER      = 2,  /* a fragment without the L4 header */
	PKT_ICMP_ERROR = 4,
	PKT_EXTENSION  = 8,  /* headers between L3 and L4 */
	PKT_PORTS      = 16, /* sport and dport are at l4 */
	PKT_ECHO       = 32, /* the identifier stands for a port */
	PKT_TRANSLATED = 64, /* an ICMP error that comes from the node by now, though src says the pod */
	PKT_TOLD       = 128, /* it came in Geneve, which told a frontend (dsr.h) */
};

struct pkt {
	struct addr src, dst;
	__be16 sport, dport;
	__u8 proto;
	bool v6;
	__u8 ttl;
	__u8 tcp;                /* flags */
	__u8 tcp_len;            /* of the TCP header, bytes */
	__u8 flags;              /* enum pkt_flags */
	__u8 icmp_type;
	__u8 file;               /* DROP() */
	__u16 l4;                /* offset from the frame's start */
	__u16 line;              /* DROP() */
	__u16 l3_len;            /* total length the L3 header states */
	__u16 pad;
	__u32 frag_id;
};

/* slow_pkt moves the parsed packet out of the stack, where the verifier would follow
 * each of its values through every branch of the slow path, into memory that it takes
 * as unknown: the slow path is then verified once, not once for each kind of packet. */
static __always_inline void slow_pkt(const struct pkt *p, enum slow_reason why)
{
	__u32 zero = 0;
	struct scratch *scratch = bpf_map_lookup_elem(&lash_scratch, &zero);

	_Static_assert(sizeof(*p) <= sizeof(scratch->pkt), "struct pkt outgrew its place in struct scratch");
	if (!scratch)
		return;
	__builtin_memcpy(scratch->pkt, p, sizeof(*p));
	scratch->why = why;
}

/* As much of an L4 header as a packet must have: all of TCP's without options. */
struct l4_head {
	__be16 sport, dport;
	__be32 seq, ack;
	__u8 doff, flags;
	__be16 window, check, urgent;
};

#define L4_SHORT 8 /* of UDP and ICMP; of SCTP what is read */

/* Addresses and keys are written in the words in which they are read: a CPU that has to put a word together from several
 * stores still under way waits for them. */
static __always_inline void addr_from4(struct addr *a, __be32 ip)
{
	a->d[0] = 0;
	a->d[1] = bpf_words(bpf_htonl(0xffff), ip);
}

/* addr_from6 reads an address of a header, which lies anywhere. */
static __always_inline void addr_from6(struct addr *a, const void *ip)
{
	const word64 *d = ip;

	a->d[0] = d[0];
	a->d[1] = d[1];
}

static __always_inline bool addr_is4(const struct addr *a)
{
	return a->d[0] == 0 && a->w[2] == bpf_htonl(0xffff);
}

static __always_inline bool addr_equal(const struct addr *a, const struct addr *b)
{
	return a->d[0] == b->d[0] && a->d[1] == b->d[1];
}

static __always_inline bool addr_zero(const struct addr *a)
{
	return (a->d[0] | a->d[1]) == 0;
}

/* A constant's fields are read one by one: it is volatile. */
#define addr_within(a, net, mask)                                   \
	(((a)->d[0] & (mask).d[0]) == (net).d[0] &&                 \
	 ((a)->d[1] & (mask).d[1]) == (net).d[1])
#define addr_is(a, constant) \
	((a)->d[0] == (constant).d[0] && (a)->d[1] == (constant).d[1])
#define mask_set(mask) (((mask).d[0] | (mask).d[1]) != 0)

/* parse_ip4 reads IPv4's fixed header. 0 or a drop reason. */
static __always_inline int parse_ip4(struct pkt *p, const struct iphdr *ip)
{
	__u16 frag = ip->frag_off;

	if (unlikely(ip->version != 4 || ip->ihl < 5))
		return DROP(p, DROP_INVALID);
	addr_from4(&p->src, ip->saddr);
	addr_from4(&p->dst, ip->daddr);
	p->proto = ip->protocol;
	p->ttl = ip->ttl;
	p->l3_len = bpf_ntohs(ip->tot_len);
	p->l4 = ETH_HLEN + ip->ihl * 4;
	if (unlikely(frag & bpf_htons(IPV4_MF | IPV4_OFFSET))) {
		p->flags |= frag & bpf_htons(IPV4_OFFSET) ? PKT_FRAGMENT | PKT_LATER : PKT_FRAGMENT;
		p->frag_id = ip->id;
	}
	return 0;
}

/* parse_ip6 reads IPv6's fixed header. 0 or a drop reason. */
static __always_inline int parse_ip6(struct pkt *p, const struct ipv6hdr *ip)
{
	if (unlikely(ip->version != 6))
		return DROP(p, DROP_INVALID);
	addr_from6(&p->src, &ip->saddr);
	addr_from6(&p->dst, &ip->daddr);
	p->proto = ip->nexthdr;
	p->ttl = ip->hop_limit;
	p->l3_len = bpf_ntohs(ip->payload_len) + sizeof(*ip);
	p->l4 = HEADERS6;
	return 0;
}

/* extends: the IPv6 header that follows is not that of L4. */
static __always_inline bool extends(__u8 next)
{
	switch (next) {
	case IPPROTO_HOPOPTS:
	case IPPROTO_ROUTING:
	case IPPROTO_DSTOPTS:
	case IPPROTO_FRAGMENT:
	case IPPROTO_AH:
		return true;
	}
	return false;
}

/* parse_l4 reads what lies at l4. 0 or a drop reason. */
static __always_inline int parse_l4(struct pkt *p, void *l4, void *end)
{
	switch (p->proto) {
	case IPPROTO_TCP: {
		struct l4_head *h = l4;

		if ((void *)(h + 1) > end)
			return DROP(p, DROP_CT_INVALID);
		p->sport = h->sport;
		p->dport = h->dport;
		p->tcp = h->flags;
		p->tcp_len = (h->doff >> 4) * 4;
		p->flags |= PKT_PORTS;
		if (unlikely(p->tcp_len < 20))
			return DROP(p, DROP_CT_INVALID);
		return 0;
	}
	case IPPROTO_UDP:
	case IPPROTO_SCTP: {
		__be16 *h = l4;

		if ((void *)h + L4_SHORT > end)
			return DROP(p, DROP_CT_INVALID);
		p->sport = h[0];
		p->dport = h[1];
		p->flags |= PKT_PORTS;
		return 0;
	}
	case IPPROTO_ICMP: {
		__u8 *h = l4;

		if (p->v6)
			return 0;
		if ((void *)(h + L4_SHORT) > end)
			return DROP(p, DROP_CT_INVALID);
		p->icmp_type = h[0];
		if (h[0] == ICMP4_ECHO) {
			p->sport = *(__be16 *)(h + 4);
			p->flags |= PKT_ECHO;
		} else if (h[0] == ICMP4_ECHO_REPLY) {
			p->dport = *(__be16 *)(h + 4);
			p->flags |= PKT_ECHO;
		} else if (h[0] == ICMP4_UNREACHABLE || h[0] == ICMP4_TIME_EXCEEDED || h[0] == ICMP4_PARAMETER) {
			p->flags |= PKT_ICMP_ERROR;
		}
		return 0;
	}
	case IPPROTO_ICMPV6: {
		__u8 *h = l4;

		if (!p->v6)
			return 0;
		if ((void *)(h + L4_SHORT) > end)
			return DROP(p, DROP_CT_INVALID);
		p->icmp_type = h[0];
		if (h[0] == ICMP6_ECHO) {
			p->sport = *(__be16 *)(h + 4);
			p->flags |= PKT_ECHO;
		} else if (h[0] == ICMP6_ECHO_REPLY) {
			p->dport = *(__be16 *)(h + 4);
			p->flags |= PKT_ECHO;
		} else if (h[0] <= ICMP6_ERROR_MAX) {
			p->flags |= PKT_ICMP_ERROR;
		}
		return 0;
	}
	}
	return 0; /* other protocols have no ports and are one connection a pair of addresses */
}

#define MAX_EXTENSIONS 6

struct ext_head {
	__u8 next, len;
	__be16 frag_off;
	__be32 frag_id;
};

/* The headers between IPv6 and L4, once there are some: rare, so by copying helper. */
static __noinline int parse_extensions(struct __sk_buff *skb, struct pkt *p)
{
	__u32 off = ETH_HLEN + sizeof(struct ipv6hdr);
	__u8 next = p->proto;

	for (int i = 0; i < MAX_EXTENSIONS; i++) {
		struct ext_head h;

		if (!extends(next)) {
			p->proto = next;
			p->l4 = off;
			return 0;
		}
		if (bpf_skb_load_bytes(skb, off, &h, sizeof(h)))
			return DROP(p, DROP_IPV6_EXTENSION);
		if (next == IPPROTO_FRAGMENT) {
			p->flags |= PKT_FRAGMENT;
			p->frag_id = h.frag_id;
			if (h.frag_off & bpf_htons(0xfff8)) {
				p->flags |= PKT_LATER;
				p->proto = h.next;
				p->l4 = off + sizeof(h);
				return 0;
			}
			off += sizeof(h);
		} else if (next == IPPROTO_AH) {
			off += (h.len + 2) * 4;
		} else {
			off += (h.len + 1) * 8;
		}
		next = h.next;
	}
	return DROP(p, DROP_IPV6_EXTENSION);
}

/* parse_frame is parse for every frame, into a *p of which only v6 is set. */
static __always_inline int parse_frame(struct __sk_buff *skb, struct pkt *p, bool v6)
{
	__u32 want = v6 ? HEADERS6 : HEADERS4;
	void *data, *end;

	data = (void *)(long)skb->data;
	end = (void *)(long)skb->data_end;
	if (unlikely(data + want + 20 > end)) {
		/* Headers in page fragments, or a short packet: ask for all there is. */
		bpf_skb_pull_data(skb, skb->len < want + 20 ? skb->len : want + 20);
		data = (void *)(long)skb->data;
		end = (void *)(long)skb->data_end;
	}
	if (data + want > end)
		return DROP(p, DROP_INVALID);
	if (!v6) {
		int err = parse_ip4(p, data + ETH_HLEN);

		if (err)
			return err;
		if (unlikely(p->flags & PKT_FRAGMENT)) {
			if (p->l4 > skb->len)
				return DROP(p, DROP_INVALID);
			if (p->flags & PKT_LATER)
				return 0;
		}
		if (likely(p->l4 == HEADERS4))
			return parse_l4(p, data + HEADERS4, end);
	} else {
		int err = parse_ip6(p, data + ETH_HLEN);

		if (err)
			return err;
		if (likely(!extends(p->proto)))
			return parse_l4(p, data + HEADERS6, end);
		err = parse_extensions(skb, p);
		if (err)
			return err;
		if (p->flags & PKT_LATER)
			return 0;
	}
	/* Options or extension headers: L4 lies further back. */
	p->flags |= PKT_EXTENSION;
	if (p->l4 > skb->len)
		return DROP(p, DROP_INVALID);
	{
		__u8 head[sizeof(struct l4_head)] = {};

		if (!bpf_skb_load_bytes(skb, p->l4, head, sizeof(head)))
			return parse_l4(p, head, head + sizeof(head));
		if (p->proto != IPPROTO_TCP && !bpf_skb_load_bytes(skb, p->l4, head, L4_SHORT))
			return parse_l4(p, head, head + L4_SHORT);
		return parse_l4(p, head, head);
	}
}

static __noinline int parse_any(struct __sk_buff *skb, struct pkt *p)
{
	return p->v6 ? parse_frame(skb, p, true) : parse_frame(skb, p, false);
}

/* parse_plain fills *p from what nearly all frames are: TCP or UDP right behind an IP header without options, in one piece.
 * False: it is something else. */
static __always_inline bool parse_plain(struct pkt *p, void *frame, void *end, bool v6)
{
	struct l4_head *l4 = frame + (v6 ? HEADERS6 : HEADERS4);
	struct ipv6hdr *ip6 = frame + ETH_HLEN;
	struct iphdr *ip = frame + ETH_HLEN;
	__u8 proto;

	__builtin_memset(p, 0, sizeof(*p));
	p->v6 = v6;
	if (unlikely((void *)(l4 + 1) > end))
		return false;
	if (v6 ? ip6->version != 6 : *(__u8 *)ip != 0x45 || (ip->frag_off & bpf_htons(IPV4_MF | IPV4_OFFSET)))
		return false;
	proto = v6 ? ip6->nexthdr : ip->protocol;
	if (likely(proto == IPPROTO_TCP)) {
		if (unlikely(l4->doff < 0x50))
			return false;
		p->tcp = l4->flags;
		p->tcp_len = (l4->doff >> 4) * 4;
	} else if (proto != IPPROTO_UDP) {
		return false;
	}
	if (v6) {
		addr_from6(&p->src, &ip6->saddr);
		addr_from6(&p->dst, &ip6->daddr);
		p->ttl = ip6->hop_limit;
		p->l3_len = bpf_ntohs(ip6->payload_len) + sizeof(*ip6);
	} else {
		addr_from4(&p->src, ip->saddr);
		addr_from4(&p->dst, ip->daddr);
		p->ttl = ip->ttl;
		p->l3_len = bpf_ntohs(ip->tot_len);
	}
	p->proto = proto;
	p->l4 = v6 ? HEADERS6 : HEADERS4;
	p->sport = l4->sport;
	p->dport = l4->dport;
	p->flags = PKT_PORTS;
	return true;
}

/* parse fills *p from an IPv4 or IPv6 frame. Afterwards HEADERS4 or HEADERS6 bytes are in the linear part. 0 or a drop reason. */
static __always_inline int parse(struct __sk_buff *skb, struct pkt *p, bool v6)
{
	return likely(parse_plain(p, (void *)(long)skb->data, (void *)(long)skb->data_end, v6)) ? 0 : parse_any(skb, p);
}

#undef FILE_ID
#endif
