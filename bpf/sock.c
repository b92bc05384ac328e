//go:build ignore

/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* The node's cgroup: services are translated once, when a socket names its peer, so
 * that established traffic to a ClusterIP costs nothing a packet. */
#include "lib/parse.h"

#define FILE_ID FILE_SOCK

#define ALLOW  1
#define REFUSE 0
#define ECONNREFUSED 111

static __always_inline struct service *service_of(const struct addr *a, __be16 port, __u8 proto)
{
	struct service_key key = { .addr = *a, .port = port, .proto = proto };

	return bpf_map_lookup_elem(&lash_services, &key);
}

static __always_inline struct backend *pick(const struct service *svc)
{
	struct backend_key key = { .service = svc->id };
	__u32 n = svc->count;

	if (!n)
		return NULL;
	key.slot = svc->first + bpf_get_prandom_u32() % n;
	return bpf_map_lookup_elem(&lash_backends, &key);
}

/* translate: a frontend in *a and *port becomes one of its backends, remembered for
 * the way back. False: the service has no backend. */
static __always_inline bool translate(struct bpf_sock_addr *ctx, struct addr *a, __be16 *port, bool *changed)
{
	struct sock_rev_key key = {};
	struct sock_rev rev = {};
	struct backend *b;
	struct service *svc = service_of(a, *port, ctx->protocol);

	*changed = false;
	if (!svc)
		return true;
	b = pick(svc);
	if (!b)
		return false;
	rev.addr = *a;
	rev.port = *port;
	rev.service = svc->id;
	key.cookie = bpf_get_socket_cookie(ctx);
	key.addr = b->addr;
	key.port = b->port;
	bpf_map_update_elem(&lash_sock_rev, &key, &rev, BPF_ANY);
	*a = b->addr;
	*port = b->port;
	*changed = true;
	return true;
}

static __always_inline int refuse(void)
{
	count(HOOK_SOCK, SLOW_UNROUTED, 0);
	if (cfg_have_set_retval)
		bpf_set_retval(-ECONNREFUSED);
	return REFUSE;
}

/* untranslate: the backend in *a and *port becomes the frontend this socket asked for. */
static __always_inline bool untranslate(struct bpf_sock_addr *ctx, struct addr *a, __be16 *port)
{
	struct sock_rev_key key = { .cookie = bpf_get_socket_cookie(ctx), .addr = *a, .port = *port };
	struct sock_rev *rev = bpf_map_lookup_elem(&lash_sock_rev, &key);

	if (!rev)
		return false;
	*a = rev->addr;
	*port = rev->port;
	return true;
}

static __always_inline void get4(struct bpf_sock_addr *ctx, struct addr *a, __be16 *port)
{
	addr_from4(a, ctx->user_ip4);
	*port = (__be16)ctx->user_port;
}

static __always_inline void get6(struct bpf_sock_addr *ctx, struct addr *a, __be16 *port)
{
	a->w[0] = ctx->user_ip6[0];
	a->w[1] = ctx->user_ip6[1];
	a->w[2] = ctx->user_ip6[2];
	a->w[3] = ctx->user_ip6[3];
	*port = (__be16)ctx->user_port;
}

static __always_inline void set4(struct bpf_sock_addr *ctx, const struct addr *a, __be16 port)
{
	ctx->user_ip4 = a->w[3];
	ctx->user_port = port;
}

static __always_inline void set6(struct bpf_sock_addr *ctx, const struct addr *a, __be16 port)
{
	ctx->user_ip6[0] = a->w[0];
	ctx->user_ip6[1] = a->w[1];
	ctx->user_ip6[2] = a->w[2];
	ctx->user_ip6[3] = a->w[3];
	ctx->user_port = port;
}

static __always_inline int forth4(struct bpf_sock_addr *ctx)
{
	struct addr a;
	__be16 port;
	bool changed;

	get4(ctx, &a, &port);
	if (!translate(ctx, &a, &port, &changed))
		return refuse();
	if (changed && addr_is4(&a))
		set4(ctx, &a, port);
	return ALLOW;
}

/* An IPv6 socket may name an IPv4 peer by its mapped address: the same row is found. */
static __always_inline int forth6(struct bpf_sock_addr *ctx)
{
	struct addr a;
	__be16 port;
	bool changed;

	get6(ctx, &a, &port);
	if (!translate(ctx, &a, &port, &changed))
		return refuse();
	if (changed)
		set6(ctx, &a, port);
	return ALLOW;
}

static __always_inline int back4(struct bpf_sock_addr *ctx)
{
	struct addr a;
	__be16 port;

	get4(ctx, &a, &port);
	if (untranslate(ctx, &a, &port))
		set4(ctx, &a, port);
	return ALLOW;
}

static __always_inline int back6(struct bpf_sock_addr *ctx)
{
	struct addr a;
	__be16 port;

	get6(ctx, &a, &port);
	if (untranslate(ctx, &a, &port))
		set6(ctx, &a, port);
	return ALLOW;
}

SEC("cgroup/connect4")     int connect4(struct bpf_sock_addr *ctx)     { return forth4(ctx); }
SEC("cgroup/connect6")     int connect6(struct bpf_sock_addr *ctx)     { return forth6(ctx); }
SEC("cgroup/sendmsg4")     int sendmsg4(struct bpf_sock_addr *ctx)     { return forth4(ctx); }
SEC("cgroup/sendmsg6")     int sendmsg6(struct bpf_sock_addr *ctx)     { return forth6(ctx); }
SEC("cgroup/recvmsg4")     int recvmsg4(struct bpf_sock_addr *ctx)     { return back4(ctx); }
SEC("cgroup/recvmsg6")     int recvmsg6(struct bpf_sock_addr *ctx)     { return back6(ctx); }
SEC("cgroup/getpeername4") int getpeername4(struct bpf_sock_addr *ctx) { return back4(ctx); }
SEC("cgroup/getpeername6") int getpeername6(struct bpf_sock_addr *ctx) { return back6(ctx); }

char LICENSE[] SEC("license") = "Dual BSD/GPL";
