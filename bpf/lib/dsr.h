/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* Direct server return: the node that a client's connection comes in at sends it on to the
 * backend's node as it is, and tells in an IP option which frontend was asked; the backend's
 * node answers the client under that name. The option is in a connection's SYN, and in
 * datagrams about once a second. Layout as the field has it: IPv4 option 154 of 8 bytes
 * (type, length, port, address), IPv6 destination option 27 of 24 bytes. */
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

/* dsr_fits: the packet can take the option. Otherwise its connection is translated at its source, too. */
static __always_inline bool dsr_fits(const struct __sk_buff *skb, const struct pkt *p, __u16 mtu)
{
	__u32 more = p->v6 ? sizeof(struct dsr6) : sizeof(struct dsr4);

	return !(p->flags & (PKT_FRAGMENT | PKT_EXTENSION)) && !skb->gso_size && skb->len - ETH_HLEN + more <= mtu;
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
		__u32 sum;

		if (bpf_skb_adjust_room(skb, sizeof(opt), BPF_ADJ_ROOM_NET, 0) || bpf_skb_load_bytes(skb, ETH_HLEN, &head.ip, sizeof(head.ip)))
			return -1;
		head.opt = opt;
		head.ip.ihl = sizeof(head) / 4;
		head.ip.tot_len = bpf_htons(p->l3_len + sizeof(opt));
		head.ip.check = 0;
		sum = bpf_csum_diff(NULL, 0, (void *)&head, sizeof(head), 0);
		sum = (sum & 0xffff) + (sum >> 16);
		sum = (sum & 0xffff) + (sum >> 16);
		head.ip.check = ~sum;
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

/* dsr_tells: the packet may tell a frontend. */
static __always_inline bool dsr_tells(const struct pkt *p)
{
	return cfg_dsr && (p->flags & PKT_EXTENSION) && has_ports(p);
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
	svc = frontend_row(&scratch->frontend, &scratch->told, scratch->told_port, p->proto);
	if (!svc && cluster_node(&scratch->told))
		svc = frontend_row(&scratch->frontend, &any, scratch->told_port, p->proto);
	return svc && (svc->flags & FRONTEND_DSR) ? 0 : DROP(p, DROP_NO_SERVICE);
}

/* direct: a service's connection, whose packets avoid the stack with legacy host routing, too. */
static __always_inline bool direct(const struct pkt *p, const struct conn *c)
{
	return (c && (c->flags & (CONN_DNAT | CONN_DSR))) || (cfg_dsr && (p->flags & PKT_EXTENSION));
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

/* dsr_to_node: the packet, to the node itself, may be for the node as a backend that another node has chosen, and tell a frontend. */
static __always_inline bool dsr_to_node(const struct pkt *p)
{
	return cfg_dsr && cfg_services && unlikely(p->flags & PKT_EXTENSION) && port_used(bpf_ntohs(p->dport), PORT_BACKEND);
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
