// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"regexp"
	"strconv"
	"strings"

	"github.com/lash-net/lash/api/agent"
)

// seenEvent is what a line of `lash monitor` says of a packet.
type seenEvent struct {
	src, dst netip.AddrPort
	proto    string
	id       uint16 // of an ICMP echo
	device   string // name or number
	reason   string // of a drop
	where    string // file:line
}

var (
	tupleLine = regexp.MustCompile(`(\S+) -> (\S+) (tcp|udp|sctp|icmp)\b`)
	dropLine  = regexp.MustCompile(`^xx drop \((.+)\) flow \S+ to endpoint \d+, ifindex (\S+), file (\S+:\d+),`)
	echoID    = regexp.MustCompile(`\bId=(\d+)`)
)

// parseEvent reads a line as `lash monitor` prints it, as JSON or for a person; of the latter the 5-tuple will do.
func parseEvent(line string) (e seenEvent, err error) {
	line = strings.TrimSpace(line)
	if strings.HasPrefix(line, "{") {
		return parseEventJSON(line)
	}
	m := tupleLine.FindStringSubmatch(line)
	if m == nil {
		return e, fmt.Errorf("%q names no packet: must be a line of 'lash monitor', with or without -o json, or at least 10.0.1.5:40000 -> 10.0.2.7:80 tcp", line)
	}
	if e.src, err = endpointOf(m[1]); err != nil {
		return e, err
	}
	if e.dst, err = endpointOf(m[2]); err != nil {
		return e, err
	}
	e.proto = m[3]
	if d := dropLine.FindStringSubmatch(line); d != nil {
		e.reason, e.device, e.where = d[1], d[2], d[3]
	}
	return e, nil
}

func parseEventJSON(line string) (e seenEvent, err error) {
	type pair struct{ Src, Dst string }
	var j struct {
		Type, Reason, File string
		Line               uint16
		Ifindex, Summary   json.RawMessage
	}
	if err := json.Unmarshal([]byte(line), &j); err != nil {
		return e, err
	}
	var h struct {
		TCP, UDP, SCTP, ICMPv4, ICMPv6 string
		L3, L4                         *pair
	}
	if json.Unmarshal(j.Summary, &h) != nil || h.L3 == nil {
		return e, fmt.Errorf("an event of type %q without a packet's addresses: take a drop or a trace of 'lash monitor -o json'", j.Type)
	}
	for proto, text := range map[string]string{"tcp": h.TCP, "udp": h.UDP, "sctp": h.SCTP, "icmp": h.ICMPv4 + h.ICMPv6} {
		if text != "" {
			e.proto = proto
		}
	}
	if e.proto == "" {
		return e, errors.New("the event's packet is neither TCP, UDP, SCTP nor ICMP")
	}
	l4 := pair{}
	if h.L4 != nil {
		l4 = *h.L4
	}
	if e.src, err = addrPort(h.L3.Src, l4.Src); err != nil {
		return e, err
	}
	if e.dst, err = addrPort(h.L3.Dst, l4.Dst); err != nil {
		return e, err
	}
	if m := echoID.FindStringSubmatch(h.ICMPv4); m != nil {
		id, _ := strconv.ParseUint(m[1], 10, 16)
		e.id = uint16(id)
	}
	if j.Type == "drop" {
		e.reason, e.where, e.device = j.Reason, fmt.Sprintf("%s:%d", j.File, j.Line), strings.Trim(string(j.Ifindex), `"`)
	}
	return e, nil
}

func endpointOf(s string) (netip.AddrPort, error) {
	if a, err := netip.ParseAddr(s); err == nil {
		return netip.AddrPortFrom(a, 0), nil
	}
	return netip.ParseAddrPort(s)
}

func addrPort(addr, port string) (netip.AddrPort, error) {
	a, err := netip.ParseAddr(addr)
	if err != nil {
		return netip.AddrPort{}, err
	}
	p, _ := strconv.ParseUint(strings.TrimSpace(strings.Split(port+"(", "(")[0]), 10, 16) // 80(http)
	return netip.AddrPortFrom(a, uint16(p)), nil
}

// fill asks about the packet of the event.
func (e seenEvent) fill(req *agent.ExplainRequest) {
	req.Src, req.Dst, req.Proto = e.src.Addr().String(), e.dst.Addr().String(), e.proto
	req.Port, req.Device = e.dst.Port(), e.device
	if req.SourcePort == 0 {
		req.SourcePort = max(e.src.Port(), e.id)
	}
}

// compare says whether the packet would be dropped again.
func (e seenEvent) compare(out io.Writer, v agent.ExplainVerdict) {
	if e.reason == "" {
		return
	}
	now := "the same would happen now"
	if v.Outcome != agent.OutcomeDropped || v.Reason != e.reason {
		now = "it would not happen to this packet now: what caused it has changed, or it was about more of the packet than its addresses and ports"
	}
	fmt.Fprintf(out, "Event:     dropped: %s (%s); %s\n", e.reason, e.where, now)
}
