//go:build ignore

/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* lash_host, egress: what the node's own processes (and, with legacy host routing, the
 * node's stack) send to the pods of this node and, in tunnel mode, to those of others. */
#include "lib/lb.h"

#define FILE_ID FILE_HOST

static __noinline int from_host_slow(struct __sk_buff *skb, struct pkt *p, __u32 why)
{
	__u32 epoch = current_epoch(), zero = 0;
	struct scratch *scratch = bpf_map_lookup_elem(&lash_scratch, &zero);
	struct conn_dir *forth, *back, *d, *other;
	struct ipcache_entry *remote = NULL;
	struct endpoint *ep, *src;
	struct conn *c;
	bool orig;
	int action, met, err;

	if (!scratch)
		return DROP(p, DROP_CT_INSERT);
	ep = endpoint_of(&p->dst);
	if (!ep)
		remote = tunnel_to(&p->dst);
	if (!remote && (!ep || (ep->flags & ENDPOINT_HOST))) {
		/* The kernel's own multicast (listener reports, solicitations) has no listener here. */
		if (p->v6 ? p->dst.b[0] == 0xff : (p->dst.b[12] & 0xf0) == 0xe0)
			return VERDICT_DROP;
		return DROP(p, DROP_UNROUTABLE);
	}
	if (p->flags & PKT_FRAGMENT) {
		err = fragment_ports(p);
		if (err)
			return err;
	}
	if (p->flags & PKT_ICMP_ERROR) {
		err = translate_report(skb, p, false);
		if (err)
			return err;
	}
	met = conn_meet(skb, MEET_OPEN);
	if (met < 0)
		return met;
	c = bpf_map_lookup_elem(&lash_conn, &scratch->key);
	if (!c)
		return DROP(p, DROP_CT_INSERT);
	orig = met == MET_ORIG;
	if (orig && !c->orig.packets && nat_taken(&scratch->key)) {
		bpf_map_delete_elem(&lash_conn, &scratch->key);
		return DROP(p, DROP_NAT_EXHAUSTED);
	}

	/* Ingress policy comes in here. */

	forth = &scratch->conn.orig; /* free again: conn_open has copied it */
	back = &scratch->conn.reply;
	__builtin_memset(forth, 0, sizeof(*forth));
	src = endpoint_of(&p->src);
	if (ep)
		decide_pod(forth, IN_HOST, ep, 0);
	else if (remote)
		decide_tunnel(forth, IN_HOST, &remote->node, src ? src->identity : IDENTITY_HOST);
	if (c->flags & CONN_DNAT)
		forth->flags |= nat_flags(c, orig);
	d = orig ? &c->orig : &c->reply;
	other = orig ? &c->reply : &c->orig;
	conn_see(c, d, p, orig, skb->len, ticks());
	count(HOOK_HOST, why, skb->len);
	dir_publish(d, forth, epoch);
	if (src && (src->flags & ENDPOINT_HOST) && !(p->flags & (PKT_ICMP_ERROR | PKT_FRAGMENT))) {
		decide_stack(back, ep ? ep->ifindex : IN_OVERLAY, ACTION_HOST, FOREVER);
		dir_publish(other, back, epoch);
	}
	action = carry_out(skb, p, HOOK_HOST, c, forth, &scratch->key, conn_tell(d, p, orig));
	return action == -1 ? DROP(p, DROP_WRITE) : action;
}

static __noinline int from_host_fast(struct __sk_buff *skb)
{
	enum slow_reason why = SLOW_NEW;
	struct pkt p;
	int verdict;

	if (skb->protocol == bpf_htons(ETH_P_IP))
		verdict = parse(skb, &p, false);
	else if (skb->protocol == bpf_htons(ETH_P_IPV6))
		verdict = parse(skb, &p, true);
	else
		return VERDICT_DROP; /* lash_host is NOARP: nothing else has a meaning on it */
	if (!verdict)
		verdict = conn_fast(skb, &p, HOOK_HOST, IN_HOST, false, &why);
	return finish(skb, &p, HOOK_HOST, verdict, why);
}

SEC("tc")
int from_host(struct __sk_buff *skb)
{
	int verdict = from_host_fast(skb);

	return likely(verdict != NOT_FAST) ? verdict : slowly(skb, HOOK_HOST, TRACE_FROM_HOST, from_host_slow);
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
