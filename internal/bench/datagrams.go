// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

const (
	floodSize  = 18                    // bytes of a datagram: the smallest frame
	floodBatch = 64                    // datagrams between two looks at the clock
	floodQuiet = 50 * time.Millisecond // nothing for so long: the flood is over
)

// newDatagrams is a UDP socket whose calls end after the time given.
func newDatagrams(addr netip.Addr, timeout time.Duration) (socket, error) {
	fd, err := unix.Socket(family(addr), unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("socket: %w", err)
	}
	s := socket(fd)
	if err := s.wait(timeout); err != nil {
		s.close()
		return -1, err
	}
	return s, nil
}

// wait bounds how long receive waits.
func (s socket) wait(timeout time.Duration) error {
	tv := unix.NsecToTimeval(int64(timeout))
	if err := unix.SetsockoptTimeval(int(s), unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv); err != nil {
		return fmt.Errorf("prepare socket: %w", err)
	}
	return nil
}

func listenDatagrams(addr netip.Addr) (socket, uint16, error) {
	s, err := newDatagrams(addr, patience)
	if err != nil {
		return -1, 0, err
	}
	if err := unix.Bind(int(s), sockaddr(netip.AddrPortFrom(addr, 0))); err != nil {
		s.close()
		return -1, 0, fmt.Errorf("bind %s: %w", addr, err)
	}
	return s.named()
}

// serveFlood counts the datagrams that reached the socket: those it takes, and those it had no room for. It shares its CPU
// with the client and gets it when the client has finished, so that most are of the latter kind; they have come all the way.
func serveFlood(s socket) (Result, error) {
	var r Result
	before, err := overflows()
	if err != nil {
		return r, err
	}
	b := make([]byte, 64)
	for {
		_, err := s.receive(b)
		if errors.Is(err, errNoAnswer) && r.Count > 0 {
			break
		}
		if err != nil {
			return r, err
		}
		if r.Count++; r.Count == 1 {
			if err := s.wait(floodQuiet); err != nil {
				return r, err
			}
		}
	}
	after, err := overflows()
	r.Count += after - before
	return r, err
}

// driveFlood sends as fast as it can. A packet is delivered before its call returns: the time is that of the whole path.
func driveFlood(server netip.AddrPort, duration time.Duration) (Result, error) {
	var r Result
	s, err := newDatagrams(server.Addr(), patience)
	if err != nil {
		return r, err
	}
	defer s.close()
	if err := s.connect(newRawAddr(server)); err != nil {
		return r, err
	}
	b := make([]byte, floodSize)
	for begin := time.Now(); r.Time < duration; r.Time = time.Since(begin) {
		for range floodBatch {
			if _, err := s.send(b); err != nil {
				return r, err
			}
		}
		r.Count += floodBatch
	}
	return r, nil
}

// overflows counts the datagrams that sockets of the thread's namespace had no room for, of both families.
func overflows() (n uint64, err error) {
	snmp, err := os.ReadFile("/proc/thread-self/net/snmp")
	if err != nil {
		return 0, err
	}
	snmp6, err := os.ReadFile("/proc/thread-self/net/snmp6")
	if err != nil {
		return 0, err
	}
	v4, ok4 := snmpField(string(snmp), "Udp:", "RcvbufErrors")
	v6, ok6 := snmp6Field(string(snmp6), "Udp6RcvbufErrors")
	if !ok4 || !ok6 {
		return 0, errors.New("the kernel does not count datagrams that find no room")
	}
	return v4 + v6, nil
}

// snmpField reads a number of /proc/net/snmp: a line of names and one of numbers for each protocol.
func snmpField(text, protocol, name string) (uint64, bool) {
	var names []string
	for line := range strings.Lines(text) {
		f := strings.Fields(line)
		if len(f) == 0 || f[0] != protocol {
			continue
		}
		if names == nil {
			names = f
			continue
		}
		for i, x := range names {
			if x == name && i < len(f) {
				n, err := strconv.ParseUint(f[i], 10, 64)
				return n, err == nil
			}
		}
	}
	return 0, false
}

// snmp6Field reads a number of /proc/net/snmp6: a name and a number on each line.
func snmp6Field(text, name string) (uint64, bool) {
	for line := range strings.Lines(text) {
		if f := strings.Fields(line); len(f) == 2 && f[0] == name {
			n, err := strconv.ParseUint(f[1], 10, 64)
			return n, err == nil
		}
	}
	return 0, false
}
