//go:build ignore

/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* The tunnel device, ingress: what other nodes send encapsulated, decapsulated by the
 * kernel. The VNI is the sender's identity. */
#include "lib/route.h"

#define FILE_ID FILE_OVERLAY

SEC("tc")
int from_overlay(struct __sk_buff *skb)
{
	return VERDICT_OK;
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
