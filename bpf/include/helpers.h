/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* The kernel's BPF helpers that Lash calls, by their number in the UAPI, and
 * the few compiler conventions every program needs. The UAPI structures
 * themselves come from the distribution's <linux/bpf.h>. */
#ifndef LASH_HELPERS_H
#define LASH_HELPERS_H

#include <stdbool.h>
#include <stddef.h>
#include <asm-generic/errno-base.h>
#include <linux/types.h>
#include <linux/bpf.h>
#include <linux/in.h>
#include <linux/in6.h>
#include <linux/if_ether.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <linux/udp.h>

#define SEC(name) __attribute__((section(name), used))
#undef __always_inline
#define __always_inline inline __attribute__((always_inline))
#define __noinline __attribute__((noinline))
#define likely(x)   __builtin_expect(!!(x), 1)
#define unlikely(x) __builtin_expect(!!(x), 0)
#define barrier()   asm volatile("" ::: "memory")
#define barrier_var(x) asm volatile("" : "+r"(x)) /* the compiler forgets what it knows of x; the verifier does not */

/* Several fields of memory that are read or written as one, whatever they are declared as. */
typedef __u64 __attribute__((may_alias)) word64;
typedef __u32 __attribute__((may_alias)) word32;

/* Map definitions, read by the loader from BTF. */
#define __uint(name, val)  int (*name)[val]
#define __type(name, val)  typeof(val) *name
#define __array(name, val) typeof(val) *name[]

#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
#define bpf_htons(x) __builtin_bswap16(x)
#define bpf_htonl(x) __builtin_bswap32(x)
#define bpf_words(first, second)       ((__u64)(__u32)(second) << 32 | (__u32)(first)) /* as they lie in memory */
#define bpf_halfwords(first, second)   ((__u32)(__u16)(second) << 16 | (__u16)(first))
#else
#define bpf_htons(x) (x)
#define bpf_htonl(x) (x)
#define bpf_words(first, second)       ((__u64)(__u32)(first) << 32 | (__u32)(second))
#define bpf_halfwords(first, second)   ((__u32)(__u16)(first) << 16 | (__u16)(second))
#endif
#define bpf_ntohs bpf_htons
#define bpf_ntohl bpf_htonl

#define PACKET_HOST 0 /* skb->pkt_type: for this node's MAC address */

/* Flags of bpf_skb_adjust_room that Debian 12's UAPI lacks. */
#define ADJ_ROOM_DECAP_L3_IPV6 (1ULL << 8) /* what comes to light is IPv6 (6.3) */

/* Values of TC and tcx verdicts; tcx took tc's numbers (Debian 12's UAPI lacks the former). */
enum {
	VERDICT_NEXT     = -1,
	VERDICT_OK       = 0,
	VERDICT_DROP     = 2,
	VERDICT_REDIRECT = 7,
};

static void *(*bpf_map_lookup_elem)(void *map, const void *key) = (void *)BPF_FUNC_map_lookup_elem;
static long (*bpf_map_update_elem)(void *map, const void *key, const void *value, __u64 flags) = (void *)BPF_FUNC_map_update_elem;
static long (*bpf_map_delete_elem)(void *map, const void *key) = (void *)BPF_FUNC_map_delete_elem;
static __u32 (*bpf_get_prandom_u32)(void) = (void *)BPF_FUNC_get_prandom_u32;
static __u64 (*bpf_jiffies64)(void) = (void *)BPF_FUNC_jiffies64;
static long (*bpf_skb_store_bytes)(struct __sk_buff *skb, __u32 off, const void *from, __u32 len, __u64 flags) = (void *)BPF_FUNC_skb_store_bytes;
static long (*bpf_skb_load_bytes)(const void *skb, __u32 off, void *to, __u32 len) = (void *)BPF_FUNC_skb_load_bytes;
static long (*bpf_l3_csum_replace)(struct __sk_buff *skb, __u32 off, __u64 from, __u64 to, __u64 size) = (void *)BPF_FUNC_l3_csum_replace;
static long (*bpf_l4_csum_replace)(struct __sk_buff *skb, __u32 off, __u64 from, __u64 to, __u64 flags) = (void *)BPF_FUNC_l4_csum_replace;
static __s64 (*bpf_csum_diff)(const void *from, __u32 from_size, const void *to, __u32 to_size, __wsum seed) = (void *)BPF_FUNC_csum_diff;
static __s64 (*bpf_csum_update)(struct __sk_buff *skb, __wsum csum) = (void *)BPF_FUNC_csum_update;
static long (*bpf_skb_pull_data)(struct __sk_buff *skb, __u32 len) = (void *)BPF_FUNC_skb_pull_data;
static long (*bpf_skb_adjust_room)(struct __sk_buff *skb, __s32 len_diff, __u32 mode, __u64 flags) = (void *)BPF_FUNC_skb_adjust_room;
static long (*bpf_redirect)(__u32 ifindex, __u64 flags) = (void *)BPF_FUNC_redirect;
static long (*bpf_redirect_peer)(__u32 ifindex, __u64 flags) = (void *)BPF_FUNC_redirect_peer;
static long (*bpf_redirect_neigh)(__u32 ifindex, struct bpf_redir_neigh *params, int plen, __u64 flags) = (void *)BPF_FUNC_redirect_neigh;
static long (*bpf_fib_lookup)(void *ctx, struct bpf_fib_lookup *params, int plen, __u32 flags) = (void *)BPF_FUNC_fib_lookup;
static struct bpf_sock *(*bpf_skc_lookup_tcp)(void *ctx, struct bpf_sock_tuple *tuple, __u32 size, __u64 netns, __u64 flags) = (void *)BPF_FUNC_skc_lookup_tcp;
static struct bpf_sock *(*bpf_sk_lookup_udp)(void *ctx, struct bpf_sock_tuple *tuple, __u32 size, __u64 netns, __u64 flags) = (void *)BPF_FUNC_sk_lookup_udp;
static long (*bpf_sk_release)(void *sock) = (void *)BPF_FUNC_sk_release;
static long (*bpf_skb_get_tunnel_key)(struct __sk_buff *skb, struct bpf_tunnel_key *key, __u32 size, __u64 flags) = (void *)BPF_FUNC_skb_get_tunnel_key;
static long (*bpf_skb_set_tunnel_key)(struct __sk_buff *skb, struct bpf_tunnel_key *key, __u32 size, __u64 flags) = (void *)BPF_FUNC_skb_set_tunnel_key;
static __u64 (*bpf_get_socket_cookie)(void *ctx) = (void *)BPF_FUNC_get_socket_cookie;
static void *(*bpf_ringbuf_reserve)(void *ring, __u64 size, __u64 flags) = (void *)BPF_FUNC_ringbuf_reserve;
static void (*bpf_ringbuf_submit)(void *data, __u64 flags) = (void *)BPF_FUNC_ringbuf_submit;
static void (*bpf_ringbuf_discard)(void *data, __u64 flags) = (void *)BPF_FUNC_ringbuf_discard;
static __u64 (*bpf_ringbuf_query)(void *ring, __u64 flags) = (void *)BPF_FUNC_ringbuf_query;
static __u64 (*bpf_ktime_get_ns)(void) = (void *)BPF_FUNC_ktime_get_ns;
static __u32 (*bpf_get_smp_processor_id)(void) = (void *)BPF_FUNC_get_smp_processor_id;
static __u64 (*bpf_get_netns_cookie)(void *ctx) = (void *)BPF_FUNC_get_netns_cookie;
static long (*bpf_probe_read_kernel)(void *to, __u32 size, const void *from) = (void *)BPF_FUNC_probe_read_kernel;
static __u64 (*bpf_xdp_get_buff_len)(struct xdp_md *ctx) = (void *)BPF_FUNC_xdp_get_buff_len;
static long (*bpf_xdp_load_bytes)(struct xdp_md *ctx, __u32 off, void *to, __u32 len) = (void *)BPF_FUNC_xdp_load_bytes;
static long (*bpf_redirect_map)(void *map, __u64 key, __u64 flags) = (void *)BPF_FUNC_redirect_map;
static void *(*bpf_skc_to_tcp_sock)(void *sk) = (void *)BPF_FUNC_skc_to_tcp_sock;
static long (*bpf_sock_hash_update)(struct bpf_sock_ops *ops, void *map, void *key, __u64 flags) = (void *)BPF_FUNC_sock_hash_update;
static long (*bpf_msg_redirect_hash)(struct sk_msg_md *msg, void *map, void *key, __u64 flags) = (void *)BPF_FUNC_msg_redirect_hash;
static int (*bpf_set_retval)(int retval) = (void *)BPF_FUNC_set_retval;

#endif
