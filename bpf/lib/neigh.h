/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* The gateway's ARP and neighbour discovery answers. The gateway has no device in the
 * pods' network; every pod finds it behind its own veth pair. */
#ifndef LASH_NEIGH_H
#define LASH_NEIGH_H

#include "parse.h"

#define FILE_ID FILE_NEIGH

struct arp_frame {
	struct ethhdr eth;
	__be16 hw, proto;
	__u8 hw_len, proto_len;
	__be16 op;
	struct mac sender_mac;
	__u8 sender_ip[4];
	struct mac target_mac;
	__u8 target_ip[4];
} __attribute__((packed));

/* answer_arp turns a request for the gateway into its answer. True: send it back. */
static __always_inline bool answer_arp(struct __sk_buff *skb, const struct iface *iface)
{
	void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
	struct arp_frame *f = data;
	struct addr target;
	__be32 ip;

	if (data + sizeof(*f) > end) {
		if (bpf_skb_pull_data(skb, sizeof(*f)))
			return false;
		data = (void *)(long)skb->data;
		end = (void *)(long)skb->data_end;
		f = data;
		if (data + sizeof(*f) > end)
			return false;
	}
	if (f->hw != bpf_htons(1) || f->proto != bpf_htons(ETH_P_IP) || f->hw_len != ETH_ALEN ||
	    f->proto_len != 4 || f->op != bpf_htons(1))
		return false;
	__builtin_memcpy(&ip, f->target_ip, 4);
	addr_from4(&target, ip);
	if (!addr_is(&target, cfg_router4))
		return false;
	f->op = bpf_htons(2);
	__builtin_memcpy(f->eth.h_dest, f->eth.h_source, ETH_ALEN);
	__builtin_memcpy(f->eth.h_source, &iface->node_mac, ETH_ALEN);
	f->target_mac = f->sender_mac;
	__builtin_memcpy(f->target_ip, f->sender_ip, 4);
	f->sender_mac = iface->node_mac;
	__builtin_memcpy(f->sender_ip, &ip, 4);
	return true;
}

struct nd_frame {
	struct ethhdr eth;
	struct ipv6hdr ip;
	__u8 type, code;
	__be16 check;
	__be32 flags;
	struct addr target;
	__u8 opt_type, opt_len;
	struct mac opt_mac;
} __attribute__((packed));

#define NA_ROUTER_SOLICITED_OVERRIDE 0xe0000000

/* answer_nd: the same for a neighbour solicitation. */
static __always_inline bool answer_nd(struct __sk_buff *skb, const struct iface *iface)
{
	void *data, *end;
	struct nd_frame *f;
	struct addr router;
	__u32 sum;
	__s64 diff;

	/* A solicitation without its option (from a unicast probe) has no room for ours. */
	if (skb->len < sizeof(*f) || bpf_skb_pull_data(skb, sizeof(*f)))
		return false;
	data = (void *)(long)skb->data;
	end = (void *)(long)skb->data_end;
	f = data;
	if (data + sizeof(*f) > end)
		return false;
	router = f->target;
	if (f->ip.hop_limit != 255 || f->ip.payload_len != bpf_htons(sizeof(*f) - HEADERS6) ||
	    f->opt_len != 1 || !addr_is(&router, cfg_router6))
		return false;
	__builtin_memcpy(f->eth.h_dest, f->eth.h_source, ETH_ALEN);
	__builtin_memcpy(f->eth.h_source, &iface->node_mac, ETH_ALEN);
	__builtin_memcpy(&f->ip.daddr, &f->ip.saddr, 16);
	__builtin_memcpy(&f->ip.saddr, &router, 16);
	f->type = ICMP6_NA;
	f->code = 0;
	f->check = 0;
	f->flags = bpf_htonl(NA_ROUTER_SOLICITED_OVERRIDE);
	f->opt_type = 2; /* target link-layer address */
	f->opt_mac = iface->node_mac;
	{
		struct { struct addr src, dst; __be32 len, next; } pseudo = {
			.src = router, .len = bpf_htonl(sizeof(*f) - HEADERS6), .next = bpf_htonl(IPPROTO_ICMPV6),
		};
		__u8 body[sizeof(*f) - HEADERS6];

		__builtin_memcpy(&pseudo.dst, &f->ip.daddr, 16);
		__builtin_memcpy(body, (void *)&f->type, sizeof(body));
		diff = bpf_csum_diff(NULL, 0, &pseudo, sizeof(pseudo), 0);
		diff = bpf_csum_diff(NULL, 0, body, sizeof(body), diff);
	}
	sum = diff;
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	f->check = ~sum;
	return true;
}

#undef FILE_ID
#endif
