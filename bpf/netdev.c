//go:build ignore

/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* The node's devices towards the network. from_netdev (ingress): packets for pods go
 * straight into them, those for services to a backend, and answers to translated
 * connections become what their client knows. to_netdev (egress): masquerading of pods'
 * packets that came through the stack, and answers of the node itself as a backend. */
#include "lib/dsr.h"

#define FILE_ID FILE_NETDEV

/* decide_answer finds the way back to where the packet came from. What the FIB cannot
 * tell now, the pod's first packet back will ask for itself. */
static __noinline int decide_answer(struct __sk_buff *skb, struct pkt *p, __u32 pod_ifindex,
				    struct conn_dir *d, __u32 flags)
{
	struct hop hop = {};
	__u32 epoch = current_epoch(), unused = 0, zero = 0;
	struct scratch *scratch = bpf_map_lookup_elem(&lash_scratch, &zero);

	if (!scratch || route(skb, p, true, &hop, &unused) != ACTION_EGRESS || !bpf_map_lookup_elem(&lash_devices, &hop.ifindex))
		return 0;
	decide_egress(&scratch->conn.reply, pod_ifindex, &hop, flags);
	dir_publish(d, &scratch->conn.reply, epoch);
	return 0;
}

/* into_pod delivers a packet of connection c to the pod of this node that it is addressed to by now. */
static __noinline int into_pod(struct __sk_buff *skb, struct pkt *p, struct conn *c, struct endpoint *ep, int met)
{
	bool orig = met == MET_ORIG;
	__u32 epoch = current_epoch(), zero = 0;
	struct scratch *scratch = bpf_map_lookup_elem(&lash_scratch, &zero);
	struct conn_dir *forth, *d, *other;
	int action;

	if (!scratch)
		return DROP(p, DROP_CT_INSERT);

	/* Ingress policy comes in here. */

	forth = &scratch->conn.orig; /* free: conn_open has copied it */
	__builtin_memset(forth, 0, sizeof(*forth));
	decide_pod(forth, IN_NETDEV, ep, DIR_TTL | nat_flags(c, orig));
	d = orig ? &c->orig : &c->reply;
	other = orig ? &c->reply : &c->orig;
	conn_see(c, d, p, orig, skb->len, ticks());
	count(HOOK_NETDEV, p->ttl <= 1 ? SLOW_TTL : scratch->why, skb->len);
	dir_publish(d, forth, epoch);
	/* The answer's way, while we are at it. The pod's first packet back is then a fast one. */
	if (orig && other->epoch != epoch && !(p->flags & (PKT_ICMP_ERROR | PKT_FRAGMENT)))
		decide_answer(skb, p, ep->ifindex, other, nat_flags(c, false));
	if (p->ttl <= 1)
		return c->flags & CONN_DNAT ? DROP(p, DROP_TTL) : VERDICT_OK;
	action = carry_out(skb, p, HOOK_NETDEV, c, forth, &scratch->key, conn_tell(d, p, orig));
	return action == -1 ? DROP(p, DROP_WRITE) : action;
}

/* A packet to a pod of this node. */
static __noinline int from_netdev_slow(struct __sk_buff *skb, struct pkt *p)
{
	__u32 zero = 0;
	struct scratch *scratch = bpf_map_lookup_elem(&lash_scratch, &zero);
	struct endpoint *ep, *src;
	struct conn *c;
	int met, err;

	if (!scratch)
		return DROP(p, DROP_CT_INSERT);
	ep = endpoint_of(&p->dst);
	if (!ep || (ep->flags & ENDPOINT_HOST))
		return VERDICT_OK; /* the stack routes it, answers it, or knows that nobody has it */
	src = endpoint_of(&p->src);
	if (src && !(src->flags & ENDPOINT_HOST))
		return DROP(p, DROP_INVALID_SOURCE); /* a pod of this node cannot come in from outside */
	err = whole_tuple(skb, p, false);
	if (err)
		return err;
	met = conn_meet(skb, MEET_KNOWN);
	if (met < 0)
		return met;
	c = met == MET_NOTHING ? NULL : bpf_map_lookup_elem(&lash_conn, &scratch->key);
	/* With legacy host routing the stack has it, but for what services translate. */
	if (!cfg_host_routing && !direct(p, c))
		return VERDICT_OK;
	if (!c) {
		met = conn_meet(skb, MEET_OPEN);
		if (met < 0)
			return met;
		c = bpf_map_lookup_elem(&lash_conn, &scratch->key);
		if (!c)
			return DROP(p, DROP_CT_INSERT);
	}
	err = dsr_note(skb, p, c);
	return err ? err : into_pod(skb, p, c, ep, met);
}

/* to_backend sends a connection from outside on to its backend on another node: from this
 * node's address, so that the answer comes back here, or as it is, with the frontend's name,
 * so that the backend's node answers. p is addressed to the backend. */
static __noinline int to_backend(struct __sk_buff *skb, struct pkt *p, struct conn *c, __u32 why)
{
	__u32 epoch = current_epoch(), zero = 0;
	struct scratch *scratch = bpf_map_lookup_elem(&lash_scratch, &zero);
	struct ipcache_entry *remote;
	struct conn_dir *forth;
	struct device *dev = NULL;
	bool wrap = false;
	struct addr nat;
	struct hop *hop;
	int action, err;
	__u16 mtu;

	if (!scratch)
		return DROP(p, DROP_CT_INSERT);
	if (p->ttl <= 1)
		return DROP(p, DROP_TTL);
	hop = (struct hop *)scratch->plan;
	forth = &scratch->conn.orig;
	__builtin_memset(forth, 0, sizeof(*forth));
	remote = tunnel_to(&p->dst);
	if (remote) {
		nat = p->v6 ? ROUTER6 : ROUTER4;
		mtu = cfg_tunnel_mtu;
		decide_tunnel(forth, IN_NETDEV, &remote->node, IDENTITY_WORLD);
		action = ACTION_TUNNEL;
	} else {
		action = route(skb, p, false, hop, &scratch->tell);
		if (action < 0)
			return action;
		dev = bpf_map_lookup_elem(&lash_devices, &hop->ifindex);
		if (action == ACTION_HOST || !dev)
			return DROP(p, DROP_UNROUTABLE);
		nat = p->v6 ? dev->ip6 : dev->ip4;
		mtu = hop->mtu ?: dev->mtu;
		wrap = cfg_dsr_geneve; /* within the tunnel no network sees an option */
		decide_egress(forth, IN_NETDEV, hop, 0);
	}
	/* A client that opens for the third time was not answered: the backend's node has its tuple already (dsr_taken), or
	 * the network does not take the option. Not the second time: that answer may be late. */
	if ((c->flags & CONN_DSR) && tcp_opens(p) && !(c->state & STATE_REPLIED) && c->orig.packets > 1)
		c->flags &= ~CONN_DSR;
	else if (!(c->flags & (CONN_CLAIMED | CONN_DSR)) && cfg_dsr && lb_direct(scratch, c) &&
		 dsr_fits(skb, p, wrap, mtu))
		c->flags |= CONN_DSR;
	if (!(c->flags & CONN_DSR)) {
		err = lb_claim(skb, p, c, &nat);
		if (err)
			return err;
		wrap = false;
	} else {
		bool tell = (p->proto != IPPROTO_TCP || tcp_opens(p)) && dsr_fits(skb, p, wrap, mtu);

		scratch->told = *conn_responder(c, &scratch->key, &scratch->told_port);
		forth->deadline = ticks() + cfg_hz;
		if (tell && !wrap && dsr_write(skb, p, &scratch->told, scratch->told_port))
			return DROP(p, DROP_WRITE);
		wrap = wrap && tell;
		if (wrap && !addr_zero(p->v6 ? &NODE6 : &NODE4))
			nat = p->v6 ? NODE6 : NODE4; /* by which nodes know each other, whatever device leads there */
	}
	forth->flags |= nat_flags(c, true);
	conn_see(c, &c->orig, p, true, skb->len, ticks());
	count(HOOK_NETDEV, action == ACTION_NEIGH ? SLOW_NEIGHBOUR : why, skb->len);
	if (action != ACTION_NEIGH)
		dir_publish(&c->orig, forth, epoch);
	if (wrap || action == ACTION_NEIGH || (action == ACTION_EGRESS && why == SLOW_DEADLINE)) {
		if (nat_apply(skb, p, c, &scratch->key, DIR_TO_NAT))
			return DROP(p, DROP_WRITE);
		if (conn_tell(&c->orig, p, true) != TRACE_NOT)
			observe(skb, TRACE_TO_NETWORK | OBSERVE_NAT, hop->ifindex, TRACE_ESTABLISHED, c->expires / cfg_hz);
		if (wrap && dsr_wrap(skb, p, &nat, &scratch->told, scratch->told_port))
			return DROP(p, DROP_WRITE);
		action = by_neighbour(skb, p, hop);
	} else {
		action = carry_out(skb, p, HOOK_NETDEV, c, forth, &scratch->key, conn_tell(&c->orig, p, true));
	}
	return action == -1 ? DROP(p, DROP_WRITE) : action;
}

/* An ICMP error to this node, or to a service, about a translated packet is for who sent that. */
static __noinline int from_netdev_error(struct __sk_buff *skb, struct pkt *p)
{
	__u32 zero = 0;
	struct scratch *scratch = bpf_map_lookup_elem(&lash_scratch, &zero);
	struct conn_dir *forth;
	struct endpoint *ep;
	struct inner *in;
	struct conn *c;
	int err;

	if (!scratch)
		return VERDICT_OK;
	in = (struct inner *)scratch->inner;
	if (inner_parse(skb, p, in))
		return VERDICT_OK;
	c = icmp_owner(scratch);
	if (!c)
		return VERDICT_OK; /* about the node's own */
	err = icmp_translate(skb, p, in, c, &scratch->nat_key);
	if (err)
		return err;
	count(HOOK_NETDEV, p->ttl <= 1 ? SLOW_TTL : SLOW_ICMP_ERROR, skb->len);
	ep = endpoint_of(&p->dst);
	if (!ep && !(c->flags & CONN_DNAT))
		return DROP(p, DROP_UNROUTABLE); /* the pod is gone */
	if (ep && ((ep->flags & ENDPOINT_HOST) || (!cfg_host_routing && !(c->flags & CONN_DNAT)) || p->ttl <= 1))
		return VERDICT_OK;
	if (!ep) {
		struct hop *hop = (struct hop *)scratch->plan;
		struct ipcache_entry *remote = tunnel_to(&p->dst);

		if (p->ttl <= 1)
			return DROP(p, DROP_TTL);
		if (remote) {
			err = to_tunnel(skb, &remote->node, IDENTITY_WORLD);
			return err == -1 ? DROP(p, DROP_WRITE) : err;
		}
		err = route(skb, p, false, hop, &scratch->tell);
		if (err < 0)
			return err;
		if (err == ACTION_HOST)
			return DROP(p, DROP_UNROUTABLE);
		err = by_neighbour(skb, p, hop);
		return err == -1 ? DROP(p, DROP_WRITE) : err;
	}
	forth = &scratch->conn.orig;
	__builtin_memset(forth, 0, sizeof(*forth));
	decide_pod(forth, IN_NETDEV, ep, DIR_TTL);
	err = carry_out(skb, p, HOOK_NETDEV, c, forth, &scratch->nat_key, conn_tell(&c->reply, p, false));
	return err == -1 ? DROP(p, DROP_WRITE) : err;
}

/* masqueraded undoes the masquerading of a packet to the node that answers a pod's. */
static __noinline int masqueraded(struct __sk_buff *skb, struct pkt *p, struct conn *c)
{
	__u32 zero = 0;
	struct scratch *scratch = bpf_map_lookup_elem(&lash_scratch, &zero);
	struct conn_dir *forth;
	struct endpoint *ep;
	__be16 port;
	int verdict;

	if (!scratch)
		return VERDICT_OK;
	ep = endpoint_of(conn_initiator(c, &scratch->key, &port));
	if (!ep)
		return DROP(p, DROP_UNROUTABLE);
	forth = &scratch->conn.reply;
	__builtin_memset(forth, 0, sizeof(*forth));
	if (cfg_host_routing && p->ttl > 1 && !(ep->flags & ENDPOINT_HOST))
		decide_pod(forth, IN_NETDEV, ep, DIR_TTL | DIR_NO_NAT);
	else /* the stack delivers it, answers that its time is exceeded, or asked itself (apart) */
		decide_stack(forth, IN_NETDEV, ACTION_PASS, 0);
	forth->flags |= DIR_NO_NAT;
	count(HOOK_NETDEV, p->ttl <= 1 ? SLOW_TTL : SLOW_MASQUERADE, skb->len);
	conn_see(c, &c->reply, p, false, skb->len, ticks());
	dir_publish(&c->reply, forth, forth->action == ACTION_PASS ? 0 : current_epoch());
	verdict = carry_out(skb, p, HOOK_NETDEV, c, forth, &scratch->key, conn_tell(&c->reply, p, false));
	return verdict == -1 ? DROP(p, DROP_WRITE) : verdict;
}

/* told_node: another node has sent the packet on to this one, as the backend, and tells which frontend was asked. The stack
 * gets it, and to_netdev gives its answers that name: the connection is kept for them. NOT_FAST: it tells none. */
static __noinline int told_node(struct __sk_buff *skb, struct pkt *p, __u32 why)
{
	__u32 zero = 0;
	struct scratch *scratch = bpf_map_lookup_elem(&lash_scratch, &zero);
	struct conn_dir *forth;
	struct conn *c;
	int err;

	if (!scratch)
		return NOT_FAST;
	err = dsr_read(skb, p);
	if (err || !scratch->told_port)
		return err ?: NOT_FAST;
	err = conn_meet(skb, MEET_OPEN);
	if (err < 0)
		return err;
	c = bpf_map_lookup_elem(&lash_conn, &scratch->key);
	if (!c)
		return DROP(p, DROP_CT_INSERT);
	if ((c->flags & CONN_DNAT) || err == MET_REPLY)
		return DROP(p, DROP_TUPLE_TAKEN); /* the client asked this node, or was asked by it, from the same port */
	err = dsr_note(skb, p, c);
	if (err)
		return err;
	forth = &scratch->conn.orig;
	decide_stack(forth, IN_NETDEV, ACTION_PASS, FOREVER);
	conn_see(c, &c->orig, p, true, skb->len, ticks());
	count(HOOK_NETDEV, why, skb->len);
	dir_publish(&c->orig, forth, current_epoch());
	return carry_out(skb, p, HOOK_NETDEV, c, forth, &scratch->key, conn_tell(&c->orig, p, true));
}

/* A packet to the node itself or to a service: an answer to what was translated here, or a
 * client's from outside. Otherwise it is the stack's. */
static __noinline int from_netdev_node(struct __sk_buff *skb, struct pkt *p, __u32 why)
{
	__u32 zero = 0;
	struct scratch *scratch = bpf_map_lookup_elem(&lash_scratch, &zero);
	struct conn_dir *d;
	struct endpoint *ep;
	struct conn *c;
	int action, met;
	bool orig;

	if (!scratch)
		return VERDICT_OK;
	if (p->flags & PKT_ICMP_ERROR)
		return from_netdev_error(skb, p);
	if (unlikely(p->flags & PKT_FRAGMENT) && fragment_ports(p))
		return VERDICT_OK;
	ep = endpoint_of(&p->dst);
	if (dsr_tells(p) && ep && (ep->flags & ENDPOINT_HOST)) {
		action = told_node(skb, p, why);
		if (action != NOT_FAST)
			return action;
	}
	met = conn_meet(skb, MEET_OUTSIDE);
	if (met <= MET_NOTHING)
		return met;
	orig = met == MET_ORIG;
	c = bpf_map_lookup_elem(&lash_conn, &scratch->key);
	if (!c || (!(c->flags & CONN_DNAT) && (orig || !(c->flags & CONN_NAT))))
		return VERDICT_OK;
	if (!(c->flags & CONN_DNAT)) {
		arrived(skb, TRACE_FROM_NETWORK);
		return masqueraded(skb, p, c);
	}
	ep = endpoint_of(&p->dst);
	if (!ep)
		return orig ? to_backend(skb, p, c, why) : to_client(skb, p, HOOK_NETDEV, c, why);
	if (orig) {
		int err = lb_claim(skb, p, c, &p->src);

		if (err)
			return err;
	}
	if (!(ep->flags & ENDPOINT_HOST))
		return into_pod(skb, p, c, ep, met);
	/* The node is its own backend, or refuses; or it is the client, to whom the frontend answers from where its route leads. */
	d = orig ? &c->orig : &c->reply;
	decide_stack(&scratch->conn.orig, IN_NETDEV, orig ? ACTION_PASS : ACTION_HOST, FOREVER);
	scratch->conn.orig.flags = nat_flags(c, orig);
	conn_see(c, d, p, orig, skb->len, ticks());
	count(HOOK_NETDEV, c->service ? why : p->flags & PKT_ECHO ? SLOW_ECHO : SLOW_REFUSED, skb->len);
	if (!(p->flags & PKT_FRAGMENT))
		dir_publish(d, &scratch->conn.orig, current_epoch());
	action = carry_out(skb, p, HOOK_NETDEV, c, &scratch->conn.orig, &scratch->key, conn_tell(d, p, orig));
	return action == -1 ? DROP(p, DROP_WRITE) : action;
}

/* What the tunnel puts before a frame, over IPv4. The header of Geneve without options is as long as VXLAN's. */
struct outer {
	struct ethhdr eth;
	struct iphdr ip;
	__be16 sport, dport, len, check;
	__be32 head;             /* of VXLAN the flags, of Geneve the kind of frame */
	__be32 vni;              /* in the upper three bytes */
} __attribute__((packed));

#define VXLAN_HEAD  0x08000000 /* there is a VNI, and nothing else */
#define GENEVE_HEAD 0x00006558 /* an Ethernet frame, no options */
#define GENEVE_OPTIONS 0x3f000000 /* how many words of them there are: not the tunnel's, which has none, but dsr_wrap's */
#define ECN_MASK 3             /* of the TOS: congestion was met, if all bits are set */

/* encapsulated: the packet is for the tunnel. Most packets of a node with a tunnel are, and need no further reading. */
static __always_inline bool encapsulated(const struct __sk_buff *skb)
{
	void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
	struct outer *o = data;

	return cfg_overlay_ifindex && skb->protocol == bpf_htons(ETH_P_IP) && (void *)&o->len <= end && *(__u8 *)&o->ip == 0x45 &&
	       o->ip.protocol == IPPROTO_UDP && !(o->ip.frag_off & bpf_htons(IPV4_MF | IPV4_OFFSET)) &&
	       o->ip.daddr == cfg_node4.w[3] && o->dport == bpf_htons((__u16)cfg_tunnel_port) &&
	       !(cfg_dsr && cfg_tunnel_geneve && (void *)&o->vni <= end && (o->head & bpf_htonl(GENEVE_OPTIONS)));
}

/* decapsulate takes a packet out of the tunnel itself, if its connection's decision leads into a pod: its way up the stack to
 * the tunnel's device, and from there once more into the stack's queue, costs more than all that Lash does with it. Whatever
 * is not plain, or needs a decision, goes that way, untouched, and from_overlay meets it.
 *
 * What the device would see to is either seen to here (the sender is the connection's node) or is left to it: a checksum of
 * the outer header, congestion met on the way, header bits that mean something. Of several packets in one (GRO) the kernel
 * goes on to believe that they are in a tunnel. Of TCP that matters only where a pod sends them on to a device that cannot
 * segment tunnels: they are segmented before it. Datagrams are split for the socket, so they are left to the device. */
static __noinline int decapsulate(struct __sk_buff *skb)
{
	__u32 least = sizeof(struct outer) + HEADERS4 + sizeof(struct l4_head), most = least + HEADERS6 - HEADERS4;
	void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
	__u64 flags = BPF_F_ADJ_ROOM_FIXED_GSO;
	const struct conn_dir *back;
	struct followed f;
	struct ethhdr *eth;
	struct conn_key k;
	struct outer *o;
	struct pkt p;
	bool v6;

	if (unlikely(data + least > end)) {
		/* The inner headers are in page fragments. */
		bpf_skb_pull_data(skb, skb->len < most ? skb->len : most);
		data = (void *)(long)skb->data;
		end = (void *)(long)skb->data_end;
	}
	o = data;
	eth = data + sizeof(*o);
	if ((void *)(eth + 1) > end || skb->vlan_present || skb->pkt_type != PACKET_HOST || o->check || (o->ip.tos & ECN_MASK) == ECN_MASK ||
	    o->head != bpf_htonl(cfg_tunnel_geneve ? GENEVE_HEAD : VXLAN_HEAD) || (o->vni & bpf_htonl(0xff)))
		return VERDICT_OK;
	v6 = eth->h_proto == bpf_htons(ETH_P_IPV6);
	if (v6 ? !parse_plain(&p, eth, end, true) : eth->h_proto != bpf_htons(ETH_P_IP) || !parse_plain(&p, eth, end, false))
		return VERDICT_OK;
	if (p.proto == IPPROTO_UDP && skb->gso_size)
		return VERDICT_OK; /* the pod's stack would split them as tunnel packets */
	if (conn_follow(&p, &k, IN_OVERLAY, false, &f) != SLOW_NOT || f.d->action != ACTION_PEER || (f.c->flags & CONN_DSR))
		return VERDICT_OK;
	back = f.orig ? &f.c->reply : &f.c->orig;
	if (back->action != ACTION_TUNNEL || !addr_is4(&back->node) || back->node.w[3] != o->ip.saddr || conn_due(f.rt, f.d, &p, f.now))
		return VERDICT_OK;
	if (v6)
		flags |= ADJ_ROOM_DECAP_L3_IPV6; /* a kernel that does not know it refuses, and the device does it */
	if (bpf_skb_adjust_room(skb, -(__s32)sizeof(*o), BPF_ADJ_ROOM_MAC, flags))
		return VERDICT_OK;
	/* What is left in front is the outer Ethernet header. */
	data = (void *)(long)skb->data;
	eth = data;
	if ((void *)(eth + 1) > (void *)(long)skb->data_end)
		return VERDICT_DROP;
	eth->h_proto = skb->protocol;
	return finish(skb, &p, HOOK_OVERLAY, conn_go(skb, &p, HOOK_OVERLAY, &k, &f), SLOW_NOT);
}

static __noinline int from_netdev_fast(struct __sk_buff *skb)
{
	enum slow_reason why = SLOW_NEW;
	struct pkt p;
	int verdict;
	bool pods;

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
	pods = for_pods(&p, &p.dst);
	if (!pods && !concerns(&p, skb->pkt_type == PACKET_HOST) && !dsr_to_node(skb, &p))
		return VERDICT_OK;
	verdict = conn_fast(skb, &p, HOOK_NETDEV, IN_NETDEV, !pods && snat_claimed(bpf_ntohs(p.dport)), &why);
	return finish(skb, &p, HOOK_NETDEV, verdict, why);
}

/* from_netdev_decide: to a pod, or to the node. Without a pod CIDR to go by, the node's own addresses look like pods' at first. */
static __always_inline int from_netdev_decide(struct __sk_buff *skb, struct pkt *p, __u32 why)
{
	bool pods = for_pods(p, &p->dst);
	int verdict = VERDICT_OK;

	if (dsr_wrapped(p)) {
		__u32 zero = 0;
		struct scratch *scratch = bpf_map_lookup_elem(&lash_scratch, &zero);

		verdict = dsr_unwrap(skb, p);
		if (verdict < 0 || !scratch)
			return verdict;
		why = scratch->why;
	}
	if (pods)
		verdict = from_netdev_slow(skb, p);
	return verdict == VERDICT_OK && !(pods && pods_known(p)) ? from_netdev_node(skb, p, why) : verdict;
}

SEC("tc")
int from_netdev(struct __sk_buff *skb)
{
	int verdict;

	if (encapsulated(skb))
		return cfg_host_routing ? decapsulate(skb) : VERDICT_OK;
	verdict = from_netdev_fast(skb);
	return likely(verdict != NOT_FAST) ? verdict : slowly(skb, HOOK_NETDEV, TRACE_FROM_NETWORK, from_netdev_decide);
}

/* to_netdev_node: what the node itself sends answers a client, perhaps, that asked for a service, or
 * comes from a port that is somebody else's towards its destination. */
static __noinline int to_netdev_node(struct __sk_buff *skb, struct pkt *p)
{
	__u32 zero = 0;
	struct scratch *scratch = bpf_map_lookup_elem(&lash_scratch, &zero);
	enum trace_reason tell;
	struct conn *c;

	if (!scratch)
		return VERDICT_OK;
	if (p->flags & PKT_ICMP_ERROR)
		return translate_report(skb, p, false);
	if ((p->flags & PKT_FRAGMENT) && fragment_ports(p))
		return VERDICT_OK;
	pkt_key(&scratch->key, p);
	c = conn_answered(&scratch->key, p);
	if (!c && cfg_dsr)
		c = dsr_answered(&scratch->key, p);
	if (!c)
		return apart(skb, p);
	if (!(c->flags & (CONN_DNAT | CONN_DSR)))
		return VERDICT_OK;
	conn_see(c, &c->reply, p, false, skb->len, ticks());
	tell = conn_tell(&c->reply, p, false);
	if (nat_apply(skb, p, c, &scratch->key, nat_flags(c, false)))
		return DROP(p, DROP_WRITE);
	count(HOOK_NETDEV_OUT, SLOW_NOT, skb->len);
	if (tell != TRACE_NOT)
		observe(skb, TRACE_TO_NETWORK | OBSERVE_NAT, skb->ifindex, tell, c->expires / cfg_hz);
	return VERDICT_OK;
}

static __noinline int to_netdev_slow(struct __sk_buff *skb, struct pkt *p)
{
	__u32 out = skb->ifindex, zero = 0;
	struct scratch *scratch = bpf_map_lookup_elem(&lash_scratch, &zero);
	struct endpoint *ep;
	struct device *dev;
	enum trace_reason tell;
	struct conn *c;
	bool orig, nat = false;
	int met, err = 0;

	if (!scratch)
		return DROP(p, DROP_CT_INSERT);
	ep = endpoint_of(&p->src);
	dev = bpf_map_lookup_elem(&lash_devices, &out);
	if (!ep || (ep->flags & ENDPOINT_HOST))
		return to_netdev_node(skb, p);
	if (!dev || (p->v6 ? !cfg_masquerade6 : !cfg_masquerade4))
		return VERDICT_OK;
	err = whole_tuple(skb, p, true);
	if (err)
		return err;
	if ((p->flags & PKT_ICMP_ERROR) && (p->flags & PKT_TRANSLATED)) {
		count(HOOK_NETDEV_OUT, SLOW_ICMP_ERROR, skb->len);
		return VERDICT_OK;
	}
	met = conn_meet(skb, MEET_OPEN);
	if (met < 0)
		return met;
	c = bpf_map_lookup_elem(&lash_conn, &scratch->key);
	if (!c)
		return DROP(p, DROP_CT_INSERT);
	orig = met == MET_ORIG;
	tell = conn_tell_out(orig ? &c->orig : &c->reply, p, orig);
	if (orig) {
		err = masquerade(skb, p, scratch, c, dev);
		if (err)
			return err;
		c->expires = ticks() + conn_lifetime(c, p->proto);
		count(HOOK_NETDEV_OUT, c->flags & CONN_NAT ? SLOW_MASQUERADE : SLOW_NOT, skb->len);
		nat = c->flags & CONN_NAT;
		if (nat && nat_apply(skb, p, c, &scratch->key, DIR_TO_NAT))
			return DROP(p, DROP_WRITE);
		if (nat) /* it may leave by more devices than one, and is the node's from here on */
			skb->mark = (skb->mark & ~MARK_MASK) | MARK_DONE;
	}
	if (tell != TRACE_NOT)
		observe(skb, TRACE_TO_NETWORK | (nat ? OBSERVE_NAT : 0), out, tell, c->expires / cfg_hz);
	return VERDICT_OK;
}

/* What is not Lash's to look at passes; the rest is left in lash_scratch. */
static __noinline int to_netdev_fast(struct __sk_buff *skb)
{
	struct pkt p;
	int verdict;

	if (skb->protocol == bpf_htons(ETH_P_IP))
		verdict = parse(skb, &p, false);
	else if (skb->protocol == bpf_htons(ETH_P_IPV6))
		verdict = parse(skb, &p, true);
	else
		return VERDICT_OK;
	if (verdict)
		return VERDICT_OK;
	/* Of the node's own traffic, what backends on its network answer, errors, and what comes from claimed ports. */
	if (!for_pods(&p, &p.src) && !(cfg_services && port_used(bpf_ntohs(p.sport), PORT_BACKEND)) &&
	    !(cfg_services && (p.flags & (PKT_ICMP_ERROR | PKT_FRAGMENT))) && !snat_claimed(bpf_ntohs(p.sport)))
		return VERDICT_OK;
	slow_pkt(&p, SLOW_NOT);
	return NOT_FAST;
}

SEC("tc")
int to_netdev(struct __sk_buff *skb)
{
	__u32 zero = 0;
	struct scratch *scratch;
	struct pkt *p;
	int verdict;

	if (likely((skb->mark & MARK_MASK) == MARK_DONE))
		return VERDICT_OK;
	verdict = to_netdev_fast(skb);
	if (verdict != NOT_FAST)
		return verdict;
	scratch = bpf_map_lookup_elem(&lash_scratch, &zero);
	if (!scratch)
		return VERDICT_DROP;
	p = (struct pkt *)scratch->pkt;
	verdict = to_netdev_slow(skb, p);
	return verdict < NOT_FAST ? drop(skb, p, HOOK_NETDEV_OUT, verdict) : verdict;
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
