// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Kinds of traffic; each is a column of the report.
const (
	RR      = "rr"      // one byte there and back on one connection, ends share a CPU
	CRR     = "crr"     // connect, one byte there and back, close, ends share a CPU
	Stream  = "stream"  // bulk data one way, ends share a CPU
	StreamX = "streamx" // bulk data one way, ends on two CPUs
	Flood   = "pps"     // small datagrams one way, as fast as one CPU sends and delivers them
)

const (
	streamBuffer = 128 << 10
	rrBatch      = 16                   // exchanges between two looks at the clock
	crrSlice     = 5 * time.Millisecond // of which the median is taken: long enough for what Lash does now and then
	patience     = 3 * time.Second
)

// socket is a blocking socket. Its calls are raw: the Go scheduler neither
// parks nor hands over this thread, so a wake-up costs what it costs in C.
type socket int

func family(addr netip.Addr) int {
	if addr.Is6() {
		return unix.AF_INET6
	}
	return unix.AF_INET
}

func newSocket(addr netip.Addr, congestion string) (socket, error) {
	family := family(addr)
	fd, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("socket: %w", err)
	}
	s := socket(fd)
	timeout := unix.NsecToTimeval(int64(patience))
	for _, f := range []func() error{
		func() error { return unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1) },
		func() error { return unix.SetsockoptString(fd, unix.IPPROTO_TCP, unix.TCP_CONGESTION, congestion) },
		func() error { return unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &timeout) },
		func() error { return unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &timeout) },
	} {
		if err := f(); err != nil {
			s.close()
			return -1, fmt.Errorf("prepare socket: %w", err)
		}
	}
	return s, nil
}

// listen binds to a free port of addr and returns it.
func listen(addr netip.Addr, congestion string) (socket, uint16, error) {
	s, err := newSocket(addr, congestion)
	if err != nil {
		return -1, 0, err
	}
	if err := unix.Bind(int(s), sockaddr(netip.AddrPortFrom(addr, 0))); err != nil {
		s.close()
		return -1, 0, fmt.Errorf("bind %s: %w", addr, err)
	}
	if err := unix.Listen(int(s), 128); err != nil {
		s.close()
		return -1, 0, fmt.Errorf("listen on %s: %w", addr, err)
	}
	return s.named()
}

// named is the socket with its port; without one it is closed.
func (s socket) named() (socket, uint16, error) {
	name, err := unix.Getsockname(int(s))
	if err != nil {
		s.close()
		return -1, 0, err
	}
	switch n := name.(type) {
	case *unix.SockaddrInet4:
		return s, uint16(n.Port), nil
	case *unix.SockaddrInet6:
		return s, uint16(n.Port), nil
	}
	s.close()
	return -1, 0, fmt.Errorf("socket name is a %T", name)
}

func sockaddr(a netip.AddrPort) unix.Sockaddr {
	if a.Addr().Is4() {
		return &unix.SockaddrInet4{Port: int(a.Port()), Addr: a.Addr().As4()}
	}
	return &unix.SockaddrInet6{Port: int(a.Port()), Addr: a.Addr().As16()}
}

// rawAddr is the kernel's form of an address, made once for many connects.
type rawAddr struct {
	bytes [unix.SizeofSockaddrInet6]byte
	size  uintptr
}

func newRawAddr(a netip.AddrPort) *rawAddr {
	r := &rawAddr{size: unix.SizeofSockaddrInet6}
	binary.BigEndian.PutUint16(r.bytes[2:], a.Port())
	if a.Addr().Is4() {
		binary.NativeEndian.PutUint16(r.bytes[:], unix.AF_INET)
		ip := a.Addr().As4()
		copy(r.bytes[4:], ip[:])
		r.size = unix.SizeofSockaddrInet4
		return r
	}
	binary.NativeEndian.PutUint16(r.bytes[:], unix.AF_INET6)
	ip := a.Addr().As16()
	copy(r.bytes[8:], ip[:])
	return r
}

func (s socket) connect(a *rawAddr) error {
	_, _, errno := unix.RawSyscall(unix.SYS_CONNECT, uintptr(s), uintptr(unsafe.Pointer(&a.bytes)), a.size)
	if errno != 0 {
		return fmt.Errorf("connect: %w", timedOut(errno))
	}
	return nil
}

func (s socket) accept() (socket, error) {
	for {
		fd, _, errno := unix.RawSyscall6(unix.SYS_ACCEPT4, uintptr(s), 0, 0, unix.SOCK_CLOEXEC, 0, 0)
		switch errno {
		case 0:
			return socket(fd), nil
		case unix.EINTR:
		default:
			return -1, fmt.Errorf("accept: %w", timedOut(errno))
		}
	}
}

// send and receive return the bytes moved, as the calls of that name do.
func (s socket) send(b []byte) (int, error)    { return s.move(unix.SYS_SENDTO, b, unix.MSG_NOSIGNAL) }
func (s socket) receive(b []byte) (int, error) { return s.move(unix.SYS_RECVFROM, b, 0) }

func (s socket) move(call uintptr, b []byte, flags uintptr) (int, error) {
	for {
		n, _, errno := unix.RawSyscall6(call, uintptr(s), uintptr(unsafe.Pointer(&b[0])), uintptr(len(b)), flags, 0, 0)
		switch errno {
		case 0:
			return int(n), nil
		case unix.EINTR:
		default:
			if call == unix.SYS_SENDTO {
				return 0, fmt.Errorf("send: %w", timedOut(errno))
			}
			return 0, fmt.Errorf("receive: %w", timedOut(errno))
		}
	}
}

func (s socket) close() { unix.RawSyscall(unix.SYS_CLOSE, uintptr(s), 0, 0) }

var errNoAnswer = fmt.Errorf("no answer in %s", patience)

// timedOut names the two ways in which a socket's timeout shows.
func timedOut(errno unix.Errno) error {
	if errno == unix.EAGAIN || errno == unix.EINPROGRESS {
		return errNoAnswer
	}
	return errno
}

// Result is what one end saw of one cell.
type Result struct {
	Count uint64        `json:"count"` // exchanges, connections, bytes or datagrams
	Time  time.Duration `json:"time"`
	P50   time.Duration `json:"p50,omitempty"` // rr: median over batches, of one exchange; crr: over slices of 5 ms, of one connection
}

const (
	byteWork = 'w'
	byteQuit = 'q' // ends a server of crr
)

// serve answers one client on a listening socket until it is done.
func serve(kind string, l socket, warm, duration time.Duration) (Result, error) {
	switch kind {
	case CRR:
		return serveConnects(l)
	case Flood:
		return serveFlood(l)
	}
	c, err := l.accept()
	if err != nil {
		return Result{}, err
	}
	defer c.close()
	if kind == RR {
		return serveEcho(c)
	}
	return serveBulk(c, warm, duration)
}

func serveEcho(c socket) (Result, error) {
	var r Result
	b := make([]byte, 1)
	for {
		n, err := c.receive(b)
		if err != nil || n == 0 {
			return r, err
		}
		if _, err := c.send(b); err != nil {
			return r, err
		}
		r.Count++
	}
}

// serveConnects closes first: the waiting state after a connection stays here,
// and the client's ports are free again at once.
func serveConnects(l socket) (Result, error) {
	var r Result
	b := make([]byte, 1)
	for {
		c, err := l.accept()
		if err != nil {
			return r, err
		}
		if n, err := c.receive(b); err != nil || n == 0 {
			c.close()
			return r, err
		}
		_, err = c.send(b)
		c.close()
		if err != nil || b[0] == byteQuit {
			return r, err
		}
		r.Count++
	}
}

// serveBulk counts what arrives in duration, after warm. Then it closes, which is
// what ends the client: only this end knows when enough was counted.
func serveBulk(c socket, warm, duration time.Duration) (Result, error) {
	var r Result
	b := make([]byte, streamBuffer)
	if _, err := c.receive(b[:1]); err != nil {
		return r, err
	}
	begin := time.Now()
	var started time.Duration
	for {
		n, err := c.receive(b)
		if err != nil {
			return r, err
		}
		now := time.Since(begin)
		if n == 0 {
			return r, fmt.Errorf("the stream ended after %s, before its time", now)
		}
		if started == 0 {
			if now >= warm {
				started = now
			}
			continue
		}
		r.Count += uint64(n)
		if r.Time = now - started; r.Time >= duration {
			return r, nil
		}
	}
}

// drive is the client's end of one cell.
func drive(kind string, server netip.AddrPort, congestion string, warm, duration time.Duration) (Result, error) {
	switch kind {
	case CRR:
		return driveConnects(server, congestion, warm, duration)
	case Flood:
		return driveFlood(server, warm+duration)
	}
	s, err := newSocket(server.Addr(), congestion)
	if err != nil {
		return Result{}, err
	}
	defer s.close()
	if err := s.connect(newRawAddr(server)); err != nil {
		return Result{}, err
	}
	if kind == RR {
		return driveEcho(s, warm, duration)
	}
	return driveBulk(s, warm+duration+patience)
}

func driveEcho(s socket, warm, duration time.Duration) (Result, error) {
	var r Result
	b := []byte{byteWork}
	batches := make([]time.Duration, 0, 1<<16)
	batch := func() error {
		for range rrBatch {
			if _, err := s.send(b); err != nil {
				return err
			}
			if n, err := s.receive(b); err != nil {
				return err
			} else if n == 0 {
				return fmt.Errorf("the server closed the connection")
			}
		}
		return nil
	}
	for begin := time.Now(); time.Since(begin) < warm; {
		if err := batch(); err != nil {
			return r, err
		}
	}
	begin := time.Now()
	for before := begin; ; {
		if err := batch(); err != nil {
			return r, err
		}
		now := time.Now()
		if len(batches) < cap(batches) {
			batches = append(batches, now.Sub(before))
		}
		r.Count += rrBatch
		before = now
		if r.Time = now.Sub(begin); r.Time >= duration {
			break
		}
	}
	r.P50 = median(batches) / rrBatch
	return r, nil
}

// median sorts times.
func median(times []time.Duration) time.Duration {
	slices.Sort(times)
	return times[len(times)/2]
}

func driveConnects(server netip.AddrPort, congestion string, warm, duration time.Duration) (Result, error) {
	var r Result
	addr := newRawAddr(server)
	b := []byte{byteWork}
	family := uintptr(unix.AF_INET)
	if server.Addr().Is6() {
		family = unix.AF_INET6
	}
	algorithm := append([]byte(congestion), 0)
	once := func() error {
		fd, _, errno := unix.RawSyscall(unix.SYS_SOCKET, family, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if errno != 0 {
			return fmt.Errorf("socket: %w", errno)
		}
		s := socket(fd)
		defer s.close()
		if _, _, errno := unix.RawSyscall6(unix.SYS_SETSOCKOPT, fd, unix.IPPROTO_TCP, unix.TCP_CONGESTION,
			uintptr(unsafe.Pointer(&algorithm[0])), uintptr(len(congestion)), 0); errno != 0 {
			return fmt.Errorf("congestion control %s: %w", congestion, errno)
		}
		if err := s.connect(addr); err != nil {
			return err
		}
		if _, err := s.send(b); err != nil {
			return err
		}
		for wanted := 1; wanted >= 0; wanted-- { // the answer, then the end
			n, err := s.receive(b)
			if err != nil {
				return err
			}
			if n != wanted {
				return fmt.Errorf("received %d bytes, want %d", n, wanted)
			}
		}
		return nil
	}
	for begin := time.Now(); time.Since(begin) < warm; {
		if err := once(); err != nil {
			return r, err
		}
	}
	var slots []time.Duration
	begin := time.Now()
	for before, count := begin, uint64(0); r.Time < duration; {
		if err := once(); err != nil {
			return r, err
		}
		count++
		now := time.Now()
		if took := now.Sub(before); took >= crrSlice {
			slots = append(slots, took/time.Duration(count))
			r.Count, before, count = r.Count+count, now, 0
			r.Time = now.Sub(begin)
		}
	}
	r.P50 = median(slots)
	b[0] = byteQuit
	return r, once()
}

// driveBulk sends until the server has had enough and closes.
func driveBulk(s socket, limit time.Duration) (Result, error) {
	var r Result
	b := make([]byte, streamBuffer)
	for begin := time.Now(); ; r.Time = time.Since(begin) {
		n, err := s.send(b)
		if errors.Is(err, unix.ECONNRESET) || errors.Is(err, unix.EPIPE) {
			return r, nil
		}
		if err != nil {
			return r, err
		}
		r.Count += uint64(n)
		if r.Time > limit {
			return r, fmt.Errorf("the server still takes data after %s", r.Time)
		}
	}
}
