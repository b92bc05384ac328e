//go:build ignore

/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* The node's devices towards the network. from_netdev (ingress): packets for pods go
 * straight into them, replies to masqueraded connections are undone. to_netdev
 * (egress): masquerading of pods' packets that came through the stack. */
#include "lib/route.h"

#define FILE_ID FILE_NETDEV

/* decide_answer finds the way back to where the packet came from. What the FIB cannot
 * tell now, the pod's first packet back will ask for itself. */
static __noinline int decide_answer(struct __sk_buff *skb, struct pkt *p, __u32 pod_ifindex,
				    struct conn_dir *d, __u32 epoch)
{
	struct hop hop = {};
	__u32 unused = 0, zero = 0;
	struct scratch *scratch = bpf_map_lookup_elem(&lash_scratch, &zero);

	if (!scratch || route(skb, p, true, &hop, &unused) != ACTION_EGRESS || !bpf_map_lookup_elem(&lash_devices, &hop.ifindex))
		return 0;
	decide_egress(&scratch->conn.reply, pod_ifindex, &hop, 0);
	dir_publish(d, &scratch->conn.reply, epoch);
	return 0;
}

static __noinline int from_netdev_slow(struct __sk_buff *skb, struct pkt *p, __u32 why)
{
	__u32 epoch = current_epoch(), zero = 0;
	struct scratch *scratch = bpf_map_lookup_elem(&lash_scratch, &zero);
	struct conn_dir *forth, *d, *other;
	struct endpoint *ep, *src;
	bool from_hi, orig;
	struct conn *c;
	int action, err = 0;

	if (!scratch)
		return DROP(p, DROP_CT_INSERT);
	ep = endpoint_of(&p->dst);
	if (!ep || (ep->flags & ENDPOINT_HOST))
		return VERDICT_OK; /* the stack routes it, answers it, or knows that nobody has it */
	src = endpoint_of(&p->src);
	if (src && !(src->flags & ENDPOINT_HOST))
		return DROP(p, DROP_INVALID_SOURCE); /* a pod of this node cannot come in from outside */
	if (!cfg_host_routing)
		return VERDICT_OK;
	if (p->flags & PKT_FRAGMENT) {
		err = fragment_ports(p);
		if (err)
			return err;
	}
	from_hi = pkt_key(&scratch->key, p);
	c = conn_open(skb, p, &scratch->key, from_hi, &err);
	if (!c)
		return err;
	orig = conn_from_initiator(c, from_hi);

	/* Ingress policy comes in here. */

	forth = &scratch->conn.orig; /* free again: conn_open has copied it */
	__builtin_memset(forth, 0, sizeof(*forth));
	decide_pod(forth, IN_NETDEV, ep, DIR_TTL);
	d = orig ? &c->orig : &c->reply;
	other = orig ? &c->reply : &c->orig;
	conn_see(c, d, p, orig, skb->len, ticks());
	count(HOOK_NETDEV, p->ttl <= 1 ? SLOW_TTL : why, skb->len);
	dir_publish(d, forth, epoch);
	/* The answer's way, while we are at it. The pod's first packet back is then a fast one. */
	if (orig && other->epoch != epoch && !(p->flags & (PKT_ICMP_ERROR | PKT_FRAGMENT)))
		decide_answer(skb, p, ep->ifindex, other, epoch);
	if (p->ttl <= 1)
		return VERDICT_OK;
	action = carry_out(skb, p, HOOK_NETDEV, c, forth, &scratch->key, conn_tell(d, p, orig));
	return action == -1 ? DROP(p, DROP_WRITE) : action;
}

/* The record that a translated tuple leads to, its key in *k. */
static __always_inline struct conn *nat_owner(const struct conn_key *translated, struct conn_key *k)
{
	struct conn_key *owner = bpf_map_lookup_elem(&lash_nat, translated);

	if (!owner)
		return NULL;
	*k = *owner;
	return bpf_map_lookup_elem(&lash_conn, k);
}

/* An ICMP error about a masqueraded packet belongs to the pod that sent it. */
static __noinline int from_netdev_error(struct __sk_buff *skb, struct pkt *p)
{
	__u32 zero = 0;
	struct scratch *scratch = bpf_map_lookup_elem(&lash_scratch, &zero);
	struct conn_key translated, k;
	struct conn_dir forth = {};
	struct endpoint *ep;
	struct inner *in;
	struct conn *c;
	struct addr pod;
	__be16 port;
	int err;

	if (!scratch)
		return VERDICT_OK;
	in = (struct inner *)scratch->inner;
	err = inner_parse(skb, p, in);
	if (err)
		return VERDICT_OK;
	conn_key(&translated, &in->src, in->sport, &in->dst, in->dport, in->proto);
	c = nat_owner(&translated, &k);
	if (!c)
		return VERDICT_OK; /* about the node's own */
	pod = c->flags & CONN_INITIATOR_HI ? k.hi : k.lo;
	port = c->flags & CONN_INITIATOR_HI ? k.hi_port : k.lo_port;
	ep = endpoint_of(&pod);
	if (!ep)
		return DROP(p, DROP_UNROUTABLE);
	decide_pod(&forth, IN_NETDEV, ep, DIR_TTL);
	in->to_pod = true;
	err = icmp_translate(skb, p, in, &pod, port);
	if (err)
		return err;
	count(HOOK_NETDEV, p->ttl <= 1 ? SLOW_TTL : SLOW_ICMP_ERROR, skb->len);
	if (!cfg_host_routing || p->ttl <= 1)
		return VERDICT_OK;
	err = carry_out(skb, p, HOOK_NETDEV, c, &forth, &k, conn_tell(&c->reply, p, false));
	return err == -1 ? DROP(p, DROP_WRITE) : err;
}

/* may_answer_masqueraded tells most of the node's own traffic apart by its port. */
static __always_inline bool may_answer_masqueraded(const struct pkt *p)
{
	__u16 port = bpf_ntohs(p->dport);

	if (p->flags & (PKT_ICMP_ERROR | PKT_FRAGMENT))
		return true;
	if (p->flags & PKT_ECHO)
		return p->dport != 0;
	if (p->proto == IPPROTO_UDP && port == cfg_tunnel_port)
		return false; /* other nodes' encapsulated packets */
	if (p->proto == IPPROTO_TCP || p->proto == IPPROTO_UDP)
		return port >= cfg_snat_min && port <= cfg_snat_max;
	return p->proto != IPPROTO_ICMPV6;
}

/* A packet to the node itself, which may answer a masqueraded one. */
static __noinline int from_netdev_nat(struct __sk_buff *skb, struct pkt *p)
{
	__u32 zero = 0;
	struct scratch *scratch = bpf_map_lookup_elem(&lash_scratch, &zero);
	struct conn_key *k;
	struct addr *pod;
	struct conn *c;
	int verdict;

	if (!scratch)
		return VERDICT_OK;
	k = &scratch->key;
	if (unlikely(p->flags & PKT_FRAGMENT) && fragment_ports(p))
		return VERDICT_OK;
	pkt_key(&scratch->nat_key, p);
	c = nat_owner(&scratch->nat_key, k);
	if (!c)
		return VERDICT_OK;
	arrived(skb, TRACE_FROM_NETWORK);
	pod = c->flags & CONN_INITIATOR_HI ? &k->hi : &k->lo;
	if (c->reply.epoch != current_epoch() || c->reply.in != IN_NETDEV || p->ttl <= 1 || !cfg_host_routing) {
		struct endpoint *ep = endpoint_of(pod);
		struct conn_dir *forth = &scratch->conn.reply;

		if (!ep)
			return DROP(p, DROP_UNROUTABLE);
		__builtin_memset(forth, 0, sizeof(*forth));
		if (cfg_host_routing && p->ttl > 1)
			decide_pod(forth, IN_NETDEV, ep, DIR_TTL | DIR_NO_NAT);
		else /* the stack delivers it, or answers that its time is exceeded */
			decide_stack(forth, IN_NETDEV, ACTION_PASS, 0);
		forth->flags |= DIR_NO_NAT;
		count(HOOK_NETDEV, p->ttl <= 1 ? SLOW_TTL : SLOW_MASQUERADE, skb->len);
		conn_see(c, &c->reply, p, false, skb->len, ticks());
		dir_publish(&c->reply, forth, forth->action == ACTION_PASS ? 0 : current_epoch());
		verdict = carry_out(skb, p, HOOK_NETDEV, c, forth, k, conn_tell(&c->reply, p, false));
	} else {
		count(HOOK_NETDEV, SLOW_NOT, skb->len);
		conn_see(c, &c->reply, p, false, skb->len, ticks());
		verdict = carry_out(skb, p, HOOK_NETDEV, c, &c->reply, k, conn_tell(&c->reply, p, false));
	}
	return verdict == -1 ? DROP(p, DROP_WRITE) : verdict;
}

static __always_inline int to_node(struct __sk_buff *skb, struct pkt *p)
{
	return p->flags & PKT_ICMP_ERROR ? from_netdev_error(skb, p) : from_netdev_nat(skb, p);
}

SEC("tc")
int from_netdev(struct __sk_buff *skb)
{
	enum slow_reason why = SLOW_NEW;
	struct pkt p, *slow;
	int verdict;

	/* Of another network, whose device gets it next. The number 0 is no network but a priority. */
	if (unlikely(skb->vlan_present) && (skb->vlan_tci & 0xfff))
		return VERDICT_OK;
	if (skb->protocol == bpf_htons(ETH_P_IP))
		verdict = parse(skb, &p, false);
	else if (skb->protocol == bpf_htons(ETH_P_IPV6))
		verdict = parse(skb, &p, true);
	else
		return VERDICT_OK;
	if (verdict)
		return VERDICT_OK; /* the stack counts what it cannot read; only pods' traffic is Lash's to drop */

	/* NodePort, LoadBalancer and external addresses come in here. */

	if (for_pods(&p, &p.dst)) {
		verdict = cfg_host_routing ? conn_fast(skb, &p, HOOK_NETDEV, IN_NETDEV, &why) : NOT_FAST;
		if (verdict != NOT_FAST)
			return verdict < NOT_FAST ? drop_early(skb, &p, HOOK_NETDEV, verdict) : verdict;
		slow = slow_pkt(&p);
		if (!slow)
			return VERDICT_DROP;
		arrived(skb, TRACE_FROM_NETWORK);
		if (why == SLOW_REPORT)
			verdict = conn_report(skb, slow, HOOK_NETDEV);
		if (verdict == NOT_FAST)
			verdict = from_netdev_slow(skb, slow, why);
		/* Without a pod CIDR to go by, the node's own addresses come here too. */
		if (verdict == VERDICT_OK && !pods_known(slow))
			verdict = to_node(skb, slow);
	} else {
		if (!may_answer_masqueraded(&p))
			return VERDICT_OK;
		slow = slow_pkt(&p);
		if (!slow)
			return VERDICT_DROP;
		verdict = to_node(skb, slow);
	}
	return verdict < NOT_FAST ? drop(skb, slow, HOOK_NETDEV, verdict) : verdict;
}

static __noinline int to_netdev_slow(struct __sk_buff *skb, struct pkt *p)
{
	__u32 out = skb->ifindex;
	struct endpoint *ep;
	struct device *dev;
	enum trace_reason tell;
	struct conn_key k;
	struct conn *c;
	bool from_hi, orig, nat = false;
	int err = 0;

	ep = endpoint_of(&p->src);
	dev = bpf_map_lookup_elem(&lash_devices, &out);
	if (!ep || (ep->flags & ENDPOINT_HOST) || !dev)
		return VERDICT_OK;
	if (p->flags & PKT_FRAGMENT) {
		err = fragment_ports(p);
		if (err)
			return err;
	}
	if (p->flags & PKT_ICMP_ERROR) {
		err = translate_report(skb, p);
		if (err)
			return err;
		if (p->flags & PKT_TRANSLATED) {
			count(HOOK_NETDEV_OUT, SLOW_ICMP_ERROR, skb->len);
			return VERDICT_OK;
		}
	}
	from_hi = pkt_key(&k, p);
	c = conn_open(skb, p, &k, from_hi, &err);
	if (!c)
		return err;
	orig = conn_from_initiator(c, from_hi);
	tell = conn_tell_out(orig ? &c->orig : &c->reply, p, orig);
	if (orig) {
		err = masquerade(skb, p, &k, c, dev);
		if (err)
			return err;
		c->expires = ticks() + conn_lifetime(c, p->proto);
		count(HOOK_NETDEV_OUT, c->flags & CONN_NAT ? SLOW_MASQUERADE : SLOW_NOT, skb->len);
		nat = c->flags & CONN_NAT;
		if (nat && nat_apply(skb, p, c, &k, DIR_TO_NAT))
			return DROP(p, DROP_WRITE);
	}
	if (tell != TRACE_NOT)
		observe(skb, TRACE_TO_NETWORK | (nat ? OBSERVE_NAT : 0), out, tell, c->expires / cfg_hz);
	return VERDICT_OK;
}

SEC("tc")
int to_netdev(struct __sk_buff *skb)
{
	struct pkt p, *slow;
	int verdict;

	if (likely((skb->mark & MARK_MASK) == MARK_DONE))
		return VERDICT_OK;
	if (!cfg_masquerade4 && !cfg_masquerade6)
		return VERDICT_OK;
	if (skb->protocol == bpf_htons(ETH_P_IP))
		verdict = parse(skb, &p, false);
	else if (skb->protocol == bpf_htons(ETH_P_IPV6))
		verdict = parse(skb, &p, true);
	else
		return VERDICT_OK;
	if (verdict || !for_pods(&p, &p.src))
		return VERDICT_OK;
	slow = slow_pkt(&p);
	if (!slow)
		return VERDICT_DROP;
	verdict = to_netdev_slow(skb, slow);
	return verdict < NOT_FAST ? drop(skb, slow, HOOK_NETDEV_OUT, verdict) : verdict;
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
