//go:build ignore

/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* The node's devices towards the network, before the kernel makes a socket buffer of a frame.
 * xdp_entry decides nothing: it follows decisions that from_netdev has put into connections'
 * records, where they lead to another machine, and passes every other frame on to
 * from_netdev, which is the complete path. Before that, sources that a person wants to hear
 * nothing of are dropped (lash_prefilter). */
#include "lib/lb.h"

#define FILE_ID FILE_XDP

/* unwanted: the packet's source is in the prefilter. */
static __always_inline bool unwanted(const struct pkt *p)
{
	struct ipcache_key key = { .prefixlen = 128, .addr = p->src };

	return bpf_map_lookup_elem(&lash_prefilter, &key) != NULL;
}

static __always_inline bool same_mac(const void *a, const struct mac *b)
{
	return !__builtin_memcmp(a, b, sizeof(*b));
}

/* nat_xdp is nat_apply for a frame: before the first write it is certain that all can be written. 0, or -1. */
static __always_inline int nat_xdp(struct xdp_md *ctx, struct pkt *p, const struct conn *c, const struct conn_key *k, __u32 flags, bool v6)
{
	void *data = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end;
	void *l4 = data + (v6 ? HEADERS6 : HEADERS4);
	__u16 *check = NULL; /* SCTP's covers the payload, and no addresses: there ports stay */
	__u64 diff;

	if (l4 + L4_SHORT > end)
		return -1;
	if (p->proto == IPPROTO_UDP) {
		check = l4 + 6;
	} else if (p->proto == IPPROTO_TCP) {
		if (l4 + sizeof(struct l4_head) > end)
			return -1;
		check = l4 + offsetof(struct l4_head, check);
	}
	nat_tuple(p, c, k, flags);
	diff = nat_write_addrs(data + ETH_HLEN, p, v6);
	if (!check)
		return 0;
	diff += nat_write_ports(l4, p);
	if (p->proto == IPPROTO_UDP && !*check)
		return 0; /* the sender left it out */
	*check = csum_apply(*check, diff);
	if (p->proto == IPPROTO_UDP && !*check)
		*check = 0xffff;
	return 0;
}

/* follow sends a packet on as its connection's record says, if that leads to another machine and the
 * device there takes frames. XDP_TX, XDP_REDIRECT, or XDP_PASS with the frame as it was. */
static __always_inline int follow(struct xdp_md *ctx, struct pkt *p, bool v6)
{
	void *data = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end;
	__u32 len = end - data, in = ctx->ingress_ifindex, out;
	struct ethhdr *eth = data;
	struct followed f;
	struct conn_key k;
	struct device *dev;
	struct addr macs;
	bool redirect;
	__u16 mtu;

	/* What changes a connection's state is from_netdev's to see. */
	if ((p->tcp & (TCP_SYN | TCP_FIN | TCP_RST)) || p->ttl <= 1)
		return XDP_PASS;
	if (conn_follow(p, &k, IN_NETDEV, snat_claimed(bpf_ntohs(p->dport)), &f) != SLOW_NOT || f.d->action != ACTION_EGRESS || conn_due(f.rt, f.d, p, f.now))
		return XDP_PASS;
	out = f.d->out_ifindex;
	macs = f.d->node;
	mtu = f.d->mtu;
	/* In one piece, and no bigger than the route allows. */
	if (data + HEADERS4 > end || bpf_xdp_get_buff_len(ctx) != len || len - ETH_HLEN > mtu)
		return XDP_PASS;
	/* For this node: flooded frames are not, and those that another device of the node accepts. */
	if (!same_mac(eth->h_dest, (struct mac *)(macs.b + ETH_ALEN))) {
		dev = bpf_map_lookup_elem(&lash_devices, &in);
		if (!dev || !same_mac(eth->h_dest, &dev->mac))
			return XDP_PASS;
	}
	if (out == in)
		out |= XDP_BACK;
	redirect = bpf_map_lookup_elem(&lash_xdp_devices, &out);
	if (!redirect && !(out & XDP_BACK))
		return XDP_PASS;
	if (nat_xdp(ctx, p, f.c, &k, f.d->flags, v6))
		return XDP_PASS;
	hop_macs(data, &macs);
	hop_ttl(data, v6);
	conn_see(f.c, f.d, p, f.orig, len, f.now);
	count(HOOK_XDP, SLOW_NOT, len);
	return redirect ? bpf_redirect_map(&lash_xdp_devices, out, XDP_DROP) : XDP_TX;
}

/* spread passes a packet to the kernel on a CPU chosen by its connection. Fragments have no ports: all of a datagram's
 * meet there. A frame that the kernel keeps more of than its bytes, which a CPU's queue would lose, stays here. */
static __always_inline int spread(struct xdp_md *ctx, const struct pkt *p)
{
	void *data = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end;
	__u32 len = end - data, in = ctx->ingress_ifindex, hash = 0;
	struct device *dev = bpf_map_lookup_elem(&lash_devices, &in);

	if (!dev || bpf_xdp_get_buff_len(ctx) != len || len - ETH_HLEN > dev->mtu)
		return XDP_PASS;
#pragma clang loop unroll(full)
	for (int w = 0; w < 4; w++)
		hash = mix(mix(hash, p->src.w[w]), p->dst.w[w]);
	if (!(p->flags & PKT_FRAGMENT))
		hash = mix(hash, (__u32)p->sport << 16 | p->dport);
	return bpf_redirect_map(&lash_xdp_cpus, hash % cfg_xdp_cpus, XDP_PASS);
}

/* from_wire reads a frame and finds out what becomes of it: an XDP action, or a drop reason. */
static __always_inline int from_wire(struct xdp_md *ctx, struct pkt *p, bool v6)
{
	void *data = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end;
	__u32 l4 = v6 ? HEADERS6 : HEADERS4;
	int action = XDP_PASS;

	p->v6 = v6;
	if (data + l4 > end || (v6 ? parse_ip6(p, data + ETH_HLEN) : parse_ip4(p, data + ETH_HLEN)))
		return XDP_PASS; /* the stack counts what it cannot read */
	if (unwanted(p))
		return DROP(p, DROP_DENYLIST);
	if (p->flags & PKT_FRAGMENT || p->l4 != l4 || (v6 && extends(p->proto)) || parse_l4(p, data + l4, end))
		p->flags |= PKT_EXTENSION; /* what lies behind L3 is from_netdev's to read */
	else if (cfg_services && has_ports(p) && (!pods_known(p) || (!for_pods(p, &p->dst) && concerns(p, true))))
		action = follow(ctx, p, v6);
	return action == XDP_PASS && cfg_xdp_cpus ? spread(ctx, p) : action;
}

/* drop_xdp counts the drop of the packet and tells about it. */
static __noinline int drop_xdp(struct xdp_md *ctx, struct pkt *p, int reason)
{
	__u32 where = (__u32)HOOK_XDP << 24 | (__u32)p->file << 16 | p->line;
	struct drop_event *e;

	drop_count(reason, where, bpf_xdp_get_buff_len(ctx));
	slow_pkt(p, SLOW_NOT);
	e = drop_event(reason, where, ctx->ingress_ifindex, 0);
	if (e) {
		__u64 len = capture_size(&e->msg.cap, bpf_xdp_get_buff_len(ctx), 1);

		if (bpf_xdp_load_bytes(ctx, 0, e->data, len))
			len = 0;
		e->msg.cap.len_cap = len;
		event_send(&e->head, sizeof(*e), sizeof(e->msg) + len);
	}
	return XDP_DROP;
}

SEC("xdp.frags")
int xdp_entry(struct xdp_md *ctx)
{
	void *data = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end;
	struct ethhdr *eth = data;
	struct pkt p = {};
	int action = XDP_PASS;

	if (data + sizeof(*eth) > end)
		return XDP_PASS;
	if (eth->h_proto == bpf_htons(ETH_P_IP))
		action = from_wire(ctx, &p, false);
	else if (eth->h_proto == bpf_htons(ETH_P_IPV6))
		action = from_wire(ctx, &p, true);
	return action < 0 ? drop_xdp(ctx, &p, action) : action;
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
