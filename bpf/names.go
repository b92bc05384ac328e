// SPDX-License-Identifier: Apache-2.0

package bpf

import "fmt"

var dropNames = map[uint8]string{
	DropInvalidSource: "Invalid source ip", DropPolicy: "Policy denied", DropInvalid: "Invalid packet",
	DropCTInvalid: "CT: Truncated or invalid header", DropUnsupportedL3: "Unsupported L3 protocol", DropWrite: "Error writing to packet",
	DropUnroutable: "Stale or unroutable IP", DropCTInsert: "CT: Map insertion failed", DropIPv6Extension: "Invalid IPv6 extension header",
	DropNATExhausted: "No mapping for NAT masquerade", DropNATProto: "Unsupported protocol for NAT masquerade", DropFIB: "FIB lookup failed",
	DropNoFragment: "First logical datagram fragment not found", DropICMPv6: "Forbidden ICMPv6 message", DropUnsupportedL2: "Unsupported L2 protocol",
	DropTunnelKey: "Tunnel key error", DropInvalidIdentity: "Invalid identity", DropUnknownSender: "Unknown sender",
	DropNoService: "Service backend not found", DropClusterIP: "Is a ClusterIP", DropSourceRange: "Denied by LB src range check",
	DropTTL: "TTL exceeded", DropDenylist: "Policy denied by denylist",
	DropVLAN: "VLAN traffic disallowed by VLAN filter", DropNoEndpoint: "Endpoint program not available",
	DropTupleTaken: "DSR: Tuple of another connection",
}

// DropName is the text of a drop reason, as the field's tools print it.
func DropName(reason uint8) string {
	if s, ok := dropNames[reason]; ok {
		return s
	}
	return fmt.Sprintf("reason %d", reason)
}

var fileNames = map[uint8]string{
	FilePod: "pod.c", FileNetdev: "netdev.c", FileHost: "host.c", FileSock: "sock.c", FileOverlay: "overlay.c", FileParse: "parse.h",
	FileConn: "conn.h", FileNAT: "nat.h", FileFIB: "fib.h", FileNeigh: "neigh.h", FileRoute: "route.h",
	FileLB: "lb.h", FileDSR: "dsr.h", FileSNAT: "snat.h", FileXDP: "xdp.c",
}

// FileName is the source file that DROP() noted.
func FileName(id uint8) string {
	if s, ok := fileNames[id]; ok {
		return s
	}
	return fmt.Sprintf("file %d", id)
}
