//go:build ignore

/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* Sockets of one pod that are connected with each other, of an application and its
 * sidecar say, hand small messages to each other without packets, in the pods that ask
 * for it. The handshake, FIN and RST are packets as ever.
 *
 * A pair is one only if each end's tuple is the mirror of the other's and both know the
 * same sequence numbers: where netfilter has redirected a connection to someone else, or
 * something stands between, nothing changes.
 *
 * A direction goes from packets to sockets never, from sockets to packets once: the
 * reader empties what came by socket first, so no byte overtakes another. It does so when it
 * carries much without an answer: packets are better at that, and have a window. An answer
 * is what an end sends that has read all there is; so a socket never holds more than
 * UNANSWERED_MAX that nobody reads. */
#include "lib/conn.h"

#define AF_INET 2

#define UNANSWERED_MAX (64 * 1024)

/* Fields of a context are read four bytes at a time. */
#define READ(field) (*(const volatile __u32 *)&(field))

/* fill makes *k from a context's own end; true: that is the hi side. Both contexts have these fields. */
#define fill(ctx, k) ({                                                                         \
	struct addr _local = {}, _remote = {};                                                  \
	if ((ctx)->family == AF_INET) {                                                         \
		addr_from4(&_local, (ctx)->local_ip4);                                          \
		addr_from4(&_remote, (ctx)->remote_ip4);                                        \
	} else {                                                                                \
		_local.w[0] = READ((ctx)->local_ip6[0]);                                        \
		_local.w[1] = READ((ctx)->local_ip6[1]);                                        \
		_local.w[2] = READ((ctx)->local_ip6[2]);                                        \
		_local.w[3] = READ((ctx)->local_ip6[3]);                                        \
		_remote.w[0] = READ((ctx)->remote_ip6[0]);                                      \
		_remote.w[1] = READ((ctx)->remote_ip6[1]);                                      \
		_remote.w[2] = READ((ctx)->remote_ip6[2]);                                      \
		_remote.w[3] = READ((ctx)->remote_ip6[3]);                                      \
	}                                                                                       \
	conn_key(&(k)->tuple, &_local, bpf_htons((ctx)->local_port), &_remote,                  \
		 (__be16)((ctx)->remote_port REMOTE_PORT_SHIFT), IPPROTO_TCP);                  \
})

/* remote_port is a network order __u32: its port is in the upper half on little endian. */
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
#define REMOTE_PORT_SHIFT >> 16
#else
#define REMOTE_PORT_SHIFT
#endif

/* Of the kernel's own structures what tells whether a socket has messages that nobody has read. */
#define KERNEL __attribute__((preserve_access_index))
struct list_head {
	struct list_head *next;
} KERNEL;
struct sock {
	void *sk_user_data;      /* a struct sk_psock and three flags */
} KERNEL;
struct sk_psock {
	struct list_head ingress_msg;
} KERNEL;

static __always_inline bool has_read_all(struct sk_msg_md *msg)
{
	struct sock *sk = msg->sk ? bpf_skc_to_tcp_sock(msg->sk) : NULL;
	struct sk_psock *psock = NULL;
	void *first = NULL;

	if (!sk || bpf_probe_read_kernel(&psock, sizeof(psock), __builtin_preserve_access_index(&sk->sk_user_data)))
		return false;
	psock = (struct sk_psock *)((unsigned long)psock & ~7UL);
	if (!psock || bpf_probe_read_kernel(&first, sizeof(first), __builtin_preserve_access_index(&psock->ingress_msg.next)))
		return false;
	return first == (void *)__builtin_preserve_access_index(&psock->ingress_msg);
}

/* join puts the end that has just been established where the other's messages find it. */
static __always_inline bool join(struct bpf_sock_ops *ctx, struct pair_key *k, bool hi)
{
	bool joined;

	k->tuple.pad[0] = hi;
	joined = !bpf_sock_hash_update(ctx, &lash_local_socks, k, BPF_ANY);
	k->tuple.pad[0] = 0;
	return joined;
}

/* stays: by its addresses the connection does not leave its namespace. */
static __always_inline bool stays(const struct pair_key *k)
{
	const struct addr *a = &k->tuple.lo, *b = &k->tuple.hi;

	return addr_equal(a, b) || (addr_is4(a) && addr_is4(b) && a->b[12] == 127 && b->b[12] == 127);
}

/* The client's end comes first: its word is kept until the server's confirms it. */
static __always_inline void active(struct bpf_sock_ops *ctx, struct pair_key *k, bool hi)
{
	struct pair fresh = {};
	struct pair_end *me = hi ? &fresh.hi : &fresh.lo;

	if (!stays(k))
		return;
	me->snd_nxt = ctx->snd_nxt;
	me->rcv_nxt = ctx->rcv_nxt;
	me->state = PAIR_SEEN;
	if (bpf_map_update_elem(&lash_local_pairs, k, &fresh, BPF_ANY))
		return;
	join(ctx, k, hi);
}

static __always_inline void passive(struct bpf_sock_ops *ctx, struct pair_key *k, bool hi)
{
	struct pair *pair = bpf_map_lookup_elem(&lash_local_pairs, k);
	struct pair_end *me, *peer;

	if (!pair)
		return;
	me = hi ? &pair->hi : &pair->lo;
	peer = hi ? &pair->lo : &pair->hi;
	if (!(peer->state & PAIR_SEEN) || peer->snd_nxt != ctx->rcv_nxt || peer->rcv_nxt != ctx->snd_nxt)
		return;
	if (!join(ctx, k, hi))
		return;
	me->state = PAIR_SEEN | PAIR_LOCAL;
	__sync_fetch_and_or(&peer->state, PAIR_LOCAL);
}

SEC("sockops")
int local_established(struct bpf_sock_ops *ctx)
{
	struct pair_key k = {};
	__u32 op = ctx->op;
	bool hi;

	if (op != BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB && op != BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB)
		return 1;
	k.netns = bpf_get_netns_cookie(ctx);
	if (!bpf_map_lookup_elem(&lash_local_netns, &k.netns))
		return 1;
	hi = fill(ctx, &k);
	if (op == BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB)
		active(ctx, &k, hi);
	else
		passive(ctx, &k, hi);
	return 1;
}

SEC("sk_msg")
int local_message(struct sk_msg_md *msg)
{
	struct pair_key k = {};
	struct pair_end *me, *peer;
	struct pair *pair;
	__u32 size = msg->size;
	bool hi;

	k.netns = bpf_get_netns_cookie(msg);
	hi = fill(msg, &k);
	pair = bpf_map_lookup_elem(&lash_local_pairs, &k);
	if (!pair)
		return SK_PASS;
	me = hi ? &pair->hi : &pair->lo;
	peer = hi ? &pair->lo : &pair->hi;
	if ((me->state & (PAIR_LOCAL | PAIR_PACKETS)) != PAIR_LOCAL)
		goto packets;
	me->unanswered += size;
	if (me->unanswered > UNANSWERED_MAX) {
		count(HOOK_LOCAL, SLOW_BULK, size);
		goto packets;
	}
	if (has_read_all(msg))
		peer->unanswered = 0;
	k.tuple.pad[0] = !hi;
	if (bpf_msg_redirect_hash(msg, &lash_local_socks, &k, BPF_F_INGRESS) != SK_PASS)
		goto packets; /* it has been closed */
	count(HOOK_LOCAL, SLOW_NOT, size);
	return SK_PASS;
packets:
	__sync_fetch_and_or(&me->state, PAIR_PACKETS);
	return SK_PASS;
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
