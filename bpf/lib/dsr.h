/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* Direct server return: the node that a client's connection comes in at sends it on to the
 * backend's node as it is, and tells which frontend was asked; the backend's node answers the
 * client under that name. It is told with a connection's SYN, and with datagrams about once a
 * second: in an IP option, or (bpf-lb-dsr-dispatch geneve) in an option of Geneve around the
 * packet, for networks that pass no IP options. Layouts as the field has them: IPv4 option 154 of
 * 8 bytes (type, length, port, address), IPv6 destination option 27 of 24 bytes, Geneve option of
 * class 0x14b and type 0x81 of 12 and 24 bytes. */
#ifndef LASH_DSR_H
#define LASH_DSR_H

#include "lb.h"

#define FILE_ID FILE_DSR

struct dsr4 {
	__u8 type, len;
	__be16 port;
	__be32 addr;
};

struct dsr6 {
	__u8 next, hdr_len;      /* of the extension header: 8 bytes each, the first not counted */
	__u8 type, len;
	__be16 port, pad;
	struct addr addr;
};

#define DSR4_TYPE 154
#define DSR6_TYPE 27

/* Geneve around an IP packet: no Ethernet header within. */
struct geneve {
	__u8 opt_len;            /* words; the upper two bits: version 0 */
	__u8 flags;
	__be16 proto;
	__be32 vni;              /* in the upper three bytes */
	__be16 opt_class;
	__u8 opt_type, opt_data; /* words behind this one */
};

struct geneve4 {
	struct geneve head;
	__be32 addr;
	__be16 port, pad;
};

struct geneve6 {
	struct geneve head;
	__be32 addr[4];
	__be16 port, pad;
};

#define GENEVE_CRITICAL 0x40   /* there is an option that may not be ignored */
#define GENEVE_DSR_CLASS 0x014b
#define GENEVE_DSR_TYPE 0x81   /* one that may not */

struct wrap4 {
	struct iphdr ip;
	struct udphdr udp;
	struct geneve4 geneve;
};

struct wrap6 {
	struct ipv6hdr ip;
	struct udphdr udp;
	struct geneve6 geneve;
};

/* dsr_fits: there is room to tell with the packet. Otherwise its connection is translated at its source, too. */
static __always_inline bool dsr_fits(const struct __sk_buff *skb, const struct pkt *p, bool wrapped, __u16 mtu)
{
	__u32 more = p->v6 ? sizeof(struct dsr6) : sizeof(struct dsr4);

	if (wrapped)
		more = p->v6 ? sizeof(struct wrap6) : sizeof(struct wrap4);
	return !(p->flags & (PKT_FRAGMENT | PKT_EXTENSION)) && !skb->gso_size && skb->len - ETH_HLEN + more <= mtu;
}

/* ip4_check is the checksum of an IPv4 header in which it is zero. */
static __always_inline __u16 ip4_check(const void *header, __u32 len)
{
	__u32 sum = bpf_csum_diff(NULL, 0, (void *)header, len, 0);

	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	return ~sum;
}

/* dsr_write puts the frontend that was asked into the packet. 0, or -1. */
static __noinline int dsr_write(struct __sk_buff *skb, struct pkt *p, const struct addr *frontend, __be16 port)
{
	if (p->v6) {
		struct dsr6 opt = { .next = p->proto, .hdr_len = sizeof(opt) / 8 - 1, .type = DSR6_TYPE, .len = sizeof(opt) - 4, .port = port, .addr = *frontend };
		struct { __be16 len; __u8 next; } head = { .len = bpf_htons(p->l3_len - sizeof(struct ipv6hdr) + sizeof(opt)), .next = IPPROTO_DSTOPTS };

		if (bpf_skb_adjust_room(skb, sizeof(opt), BPF_ADJ_ROOM_NET, 0) ||
		    bpf_skb_store_bytes(skb, HEADERS6, &opt, sizeof(opt), BPF_F_RECOMPUTE_CSUM) ||
		    bpf_skb_store_bytes(skb, ETH_HLEN + offsetof(struct ipv6hdr, payload_len), &head, 3, BPF_F_RECOMPUTE_CSUM))
			return -1;
		p->l4 += sizeof(opt);
		p->l3_len += sizeof(opt);
	} else {
		struct dsr4 opt = { .type = DSR4_TYPE, .len = sizeof(opt), .port = port, .addr = frontend->w[3] };
		struct { struct iphdr ip; struct dsr4 opt; } head;

		if (bpf_skb_adjust_room(skb, sizeof(opt), BPF_ADJ_ROOM_NET, 0) || bpf_skb_load_bytes(skb, ETH_HLEN, &head.ip, sizeof(head.ip)))
			return -1;
		head.opt = opt;
		head.ip.ihl = sizeof(head) / 4;
		head.ip.tot_len = bpf_htons(p->l3_len + sizeof(opt));
		head.ip.check = 0;
		head.ip.check = ip4_check(&head, sizeof(head));
		if (bpf_skb_store_bytes(skb, ETH_HLEN, &head, sizeof(head), 0))
			return -1;
		p->l4 += sizeof(opt);
		p->l3_len += sizeof(opt);
	}
	return 0;
}

/* cluster_node: the address is that of a node of the cluster, not this one. */
static __always_inline bool cluster_node(const struct addr *a)
{
	struct ipcache_entry *e = ipcache_of(a);

	return e && (e->identity == IDENTITY_REMOTE_NODE || e->identity == IDENTITY_APISERVER);
}

/* dsr_head fills Geneve's header and the head of its option. data: bytes of the option behind that. */
static __always_inline void dsr_head(struct geneve *g, bool v6, __u8 data)
{
	g->opt_len = data / 4 + 1;
	g->flags = GENEVE_CRITICAL;
	g->proto = bpf_htons(v6 ? ETH_P_IPV6 : ETH_P_IP);
	g->vni = bpf_htonl(IDENTITY_WORLD << 8);
	g->opt_class = bpf_htons(GENEVE_DSR_CLASS);
	g->opt_type = GENEVE_DSR_TYPE;
	g->opt_data = data / 4;
}

/* dsr_wrap puts the packet, addressed to its backend, into one of Geneve from this node's address own to the same backend,
 * with the frontend that was asked; p keeps describing what is inside. So the way is the connection's own, whatever the
 * network knows of nodes. UDP's checksum is left out, as tunnels may (RFC 6935): both IPv6 and what it carries have been
 * summed inside, with their addresses. 0, or -1. */
static __noinline int dsr_wrap(struct __sk_buff *skb, const struct pkt *p, const struct addr *own, const struct addr *frontend, __be16 port)
{
	__u16 len = p->l3_len;
	__be16 sport = p->sport | bpf_htons(0xc000); /* different for different connections */

	if (p->v6) {
		struct wrap6 w = { .ip.version = 6, .ip.hop_limit = 64, .ip.nexthdr = IPPROTO_UDP };

		len += sizeof(w) - sizeof(w.ip);
		w.ip.payload_len = bpf_htons(len);
		__builtin_memcpy(&w.ip.saddr, own, 16);
		__builtin_memcpy(&w.ip.daddr, &p->dst, 16);
		w.udp.source = sport;
		w.udp.dest = bpf_htons((__u16)cfg_dsr_port);
		w.udp.len = bpf_htons(len);
		dsr_head(&w.geneve.head, true, sizeof(w.geneve) - sizeof(w.geneve.head));
		__builtin_memcpy(w.geneve.addr, frontend, 16);
		w.geneve.port = port;
		return bpf_skb_adjust_room(skb, sizeof(w), BPF_ADJ_ROOM_MAC, BPF_F_ADJ_ROOM_ENCAP_L3_IPV6 | BPF_F_ADJ_ROOM_ENCAP_L4_UDP) ||
		       bpf_skb_store_bytes(skb, ETH_HLEN, &w, sizeof(w), BPF_F_RECOMPUTE_CSUM) ? -1 : 0;
	} else {
		struct wrap4 w = { .ip.version = 4, .ip.ihl = 5, .ip.ttl = 64, .ip.protocol = IPPROTO_UDP, .ip.frag_off = bpf_htons(IPV4_DF) };

		len += sizeof(w);
		w.ip.tot_len = bpf_htons(len);
		w.ip.saddr = own->w[3];
		w.ip.daddr = p->dst.w[3];
		w.ip.check = ip4_check(&w.ip, sizeof(w.ip));
		w.udp.source = sport;
		w.udp.dest = bpf_htons((__u16)cfg_dsr_port);
		w.udp.len = bpf_htons(len - sizeof(w.ip));
		dsr_head(&w.geneve.head, false, sizeof(w.geneve) - sizeof(w.geneve.head));
		w.geneve.addr = frontend->w[3];
		w.geneve.port = port;
		return bpf_skb_adjust_room(skb, sizeof(w), BPF_ADJ_ROOM_MAC, BPF_F_ADJ_ROOM_ENCAP_L3_IPV4 | BPF_F_ADJ_ROOM_ENCAP_L4_UDP) ||
		       bpf_skb_store_bytes(skb, ETH_HLEN, &w, sizeof(w), BPF_F_RECOMPUTE_CSUM) ? -1 : 0;
	}
}

/* dsr_wrapped: the packet may be what another node has wrapped. */
static __always_inline bool dsr_wrapped(const struct pkt *p)
{
	return cfg_dsr && p->proto == IPPROTO_UDP && p->dport == bpf_htons((__u16)cfg_dsr_port) && !(p->flags & (PKT_FRAGMENT | PKT_EXTENSION));
}

/* dsr_geneve reads Geneve's header. True: it has the option that tells a frontend. */
static __always_inline bool dsr_geneve(const struct __sk_buff *skb, const struct pkt *p, struct geneve *g)
{
	__u8 data = p->v6 ? sizeof(struct geneve6) - sizeof(*g) : sizeof(struct geneve4) - sizeof(*g);

	return !bpf_skb_load_bytes(skb, p->l4 + sizeof(struct udphdr), g, sizeof(*g)) && g->opt_len == data / 4 + 1 &&
	       g->proto == bpf_htons(p->v6 ? ETH_P_IPV6 : ETH_P_IP) && g->opt_class == bpf_htons(GENEVE_DSR_CLASS) &&
	       g->opt_type == GENEVE_DSR_TYPE && g->opt_data == data / 4;
}

/* dsr_unwrap takes a packet that another node has wrapped out again: the frontend is in lash_scratch then, and p
 * describes what was inside. 0, also if it is something else, or a drop reason. */
static __noinline int dsr_unwrap(struct __sk_buff *skb, struct pkt *p)
{
	__u32 zero = 0, at = p->l4 + sizeof(struct udphdr) + sizeof(struct geneve);
	struct scratch *scratch = bpf_map_lookup_elem(&lash_scratch, &zero);
	struct addr to = p->dst, told = {};
	bool v6 = p->v6;
	struct geneve g;
	__be16 port;
	__s32 len = v6 ? sizeof(struct wrap6) : sizeof(struct wrap4);
	int err;

	if (!scratch || skb->gso_size || !endpoint_of(&p->dst) || !dsr_geneve(skb, p, &g))
		return 0;
	if (!cluster_node(&p->src))
		return DROP(p, DROP_UNKNOWN_SENDER);
	if (v6)
		err = bpf_skb_load_bytes(skb, at, &told, 16) || bpf_skb_load_bytes(skb, at + 16, &port, sizeof(port));
	else
		err = bpf_skb_load_bytes(skb, at, &told.w[3], 4) || bpf_skb_load_bytes(skb, at + 4, &port, sizeof(port));
	if (err || bpf_skb_adjust_room(skb, -len, BPF_ADJ_ROOM_MAC, 0))
		return DROP(p, DROP_WRITE);
	if (!v6)
		told.w[2] = bpf_htonl(0xffff);
	__builtin_memset(p, 0, sizeof(*p));
	p->v6 = v6;
	err = parse_any(skb, p);
	if (err)
		return err;
	if (!addr_equal(&p->dst, &to))
		return DROP(p, DROP_INVALID);
	scratch->told = told;
	scratch->told_port = port;
	scratch->why = SLOW_EXTENSION;
	p->flags |= PKT_TOLD;
	return 0;
}

/* dsr_tells: the packet may tell a frontend. */
static __always_inline bool dsr_tells(const struct pkt *p)
{
	return cfg_dsr && (p->flags & (PKT_EXTENSION | PKT_TOLD)) && has_ports(p);
}

/* dsr_read leaves in lash_scratch the frontend that another node tells with the packet, if it does and this cluster has
 * it: nobody makes a pod speak in another's name. 0 (with told_port 0: it tells none) or a drop reason. */
static __noinline int dsr_read(struct __sk_buff *skb, struct pkt *p)
{
	__u32 zero = 0;
	struct scratch *scratch = bpf_map_lookup_elem(&lash_scratch, &zero);
	struct service *svc;
	struct addr any = {};

	if (!scratch)
		return DROP(p, DROP_NO_SERVICE);
	if (!p->v6)
		addr_from4(&any, 0);
	if (!(p->flags & PKT_TOLD)) {
		scratch->told_port = 0;
		if (p->v6) {
			struct dsr6 opt;

			if (bpf_skb_load_bytes(skb, HEADERS6, &opt, sizeof(opt)) || opt.hdr_len != sizeof(opt) / 8 - 1 || opt.type != DSR6_TYPE || opt.len != sizeof(opt) - 4)
				return 0;
			scratch->told = opt.addr;
			scratch->told_port = opt.port;
		} else {
			struct dsr4 opt;

			if (bpf_skb_load_bytes(skb, HEADERS4, &opt, sizeof(opt)) || opt.type != DSR4_TYPE || opt.len != sizeof(opt))
				return 0;
			addr_from4(&scratch->told, opt.addr);
			scratch->told_port = opt.port;
		}
	}
	svc = frontend_row(&scratch->frontend, &scratch->told, scratch->told_port, p->proto);
	if (!svc && cluster_node(&scratch->told))
		svc = frontend_row(&scratch->frontend, &any, scratch->told_port, p->proto);
	return svc && (svc->flags & FRONTEND_DSR) ? 0 : DROP(p, DROP_NO_SERVICE);
}

/* direct: a service's connection, whose packets avoid the stack with legacy host routing, too. */
static __always_inline bool direct(const struct pkt *p, const struct conn *c)
{
	return (c && (c->flags & (CONN_DNAT | CONN_DSR))) || (cfg_dsr && (p->flags & (PKT_EXTENSION | PKT_TOLD)));
}

/* dsr_taken: a SYN has the tuple of a connection that its client has by way of another frontend, be it one that
 * this node serves: the backend could not tell the two apart. */
static __noinline bool dsr_taken(const struct pkt *p, const struct conn *c)
{
	__u32 zero = 0;
	struct scratch *scratch = bpf_map_lookup_elem(&lash_scratch, &zero);
	struct conn_key *owner;

	if (!scratch || !tcp_opens(p))
		return false;
	if ((c->flags & CONN_DSR) && (c->to_port != scratch->told_port || !addr_equal(&c->to_addr, &scratch->told)))
		return true;
	owner = bpf_map_lookup_elem(&lash_nat, &scratch->key);
	if (!owner || !nat_needed(bpf_map_lookup_elem(&lash_conn, owner), ticks(), false))
		return false;
	bpf_map_delete_elem(&lash_conn, &scratch->key); /* answers would find it before the other */
	return true;
}

/* dsr_note remembers the frontend that a packet tells in its connection, whose answers then come
 * from there. 0 or a drop reason. */
static __always_inline int dsr_note(struct __sk_buff *skb, struct pkt *p, struct conn *c)
{
	__u32 zero = 0;
	struct scratch *scratch = bpf_map_lookup_elem(&lash_scratch, &zero);
	int err;

	if (!scratch || !dsr_tells(p) || (c->flags & CONN_DNAT))
		return 0;
	err = dsr_read(skb, p);
	if (err || !scratch->told_port)
		return err;
	if (dsr_taken(p, c))
		return DROP(p, DROP_TUPLE_TAKEN); /* the client's third SYN will come translated (to_backend) */
	if (!(c->flags & CONN_DSR))
		c->orig.epoch = c->reply.epoch = 0; /* decided for what it was without */
	c->to_addr = scratch->told;
	c->to_port = scratch->told_port;
	c->flags |= CONN_DSR;
	return 0;
}

/* dsr_to_node: the packet, to the node itself, is for the node as a backend that another node has chosen, and tells a frontend. */
static __always_inline bool dsr_to_node(const struct __sk_buff *skb, const struct pkt *p)
{
	struct geneve g;

	if (!cfg_dsr || !cfg_services)
		return false;
	if (unlikely(p->flags & PKT_EXTENSION))
		return port_used(bpf_ntohs(p->dport), PORT_BACKEND);
	return unlikely(dsr_wrapped(p)) && dsr_geneve(skb, p, &g);
}

/* dsr_answered finds the record of a connection that the node, as a backend, answers itself under a frontend's name. k
 * becomes the record's key. What the client says is not seen, but for its first packet: an answer to a SYN that told
 * nothing, with the tuple of a connection that is over, belongs to one that came directly. */
static __noinline struct conn *dsr_answered(struct conn_key *k, const struct pkt *p)
{
	bool from_hi = pkt_key(k, p);
	struct conn *c = bpf_map_lookup_elem(&lash_conn, k);

	if (!c || !(c->flags & CONN_DSR) || (c->flags & CONN_DNAT) || conn_from_initiator(c, from_hi) || past(ticks(), c->expires))
		return NULL;
	if (!(p->tcp & TCP_SYN) || !conn_closed(c))
		return c;
	bpf_map_delete_elem(&lash_conn, k);
	return NULL;
}

#undef FILE_ID
#endif
