// SPDX-License-Identifier: Apache-2.0

// Command toolbox is the sandbox's test server and probe: one static binary of the standard library.
//
//	toolbox serve [-http :8080] [-udp :8081] [-tcp :8082] [-drain 0]   answer until killed; with -drain, that long after SIGTERM
//	toolbox pause                                           do nothing until killed
//	toolbox probe [-interval 1ms] [-for 10s] [-size 0] [-who] [-unconnected] NETWORK ADDR   send numbered messages until the time is over or SIGTERM, report what is lost
//	toolbox load [-rate 2000] [-for 10s] [-new 25] URL...   send HTTP requests at that rate, report what fails
//	toolbox ask NETWORK ADDR MESSAGE                        print what one message is answered with
//
// NETWORK is udp, udp4, udp6, tcp, tcp4 or tcp6; of a probe also icmp4 or icmp6, ADDR being without a port. HTTP: /hostname, /clientip (ADDR:PORT as seen),
// /echo?msg=, /bytes?n= (n bytes), /healthz. UDP and TCP: the messages
// "hostname" and "clientip" are answered with just that, "who N" with N and the name, over UDP also with how many datagrams had come before
// this one that its socket had no room for; over TCP "resent" with how many segments the server sent again and how many of them
// needlessly; everything else is echoed.
package main

import (
	"bufio"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/signal"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"
)

func main() {
	cmd, args := "help", []string(nil)
	if len(os.Args) > 1 {
		cmd, args = os.Args[1], os.Args[2:]
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	var err error
	switch cmd {
	case "serve":
		err = serve(ctx, args)
	case "pause":
		<-ctx.Done()
	case "probe":
		err = probe(ctx, args)
	case "load":
		err = load(ctx, args)
	case "ask":
		err = ask(ctx, args)
	default:
		err = errors.New("usage: toolbox serve|pause|probe|load|ask [FLAGS]")
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "toolbox:", err)
		os.Exit(1)
	}
}

func serve(ctx context.Context, args []string) error {
	fs := flag.NewFlagSet("serve", flag.ExitOnError)
	httpAddr := fs.String("http", ":8080", "HTTP `address`; empty for none")
	udpAddr := fs.String("udp", ":8081", "UDP echo `address`; empty for none")
	tcpAddr := fs.String("tcp", ":8082", "TCP echo `address`; empty for none")
	drain := fs.Duration("drain", 0, "how long to go on after SIGTERM, not ready, closing each HTTP connection with its next answer; 0: end at once")
	_ = fs.Parse(args)
	host, err := os.Hostname()
	if err != nil {
		return err
	}
	fail := make(chan error, 3)
	var leaving atomic.Bool
	web := &http.Server{Handler: announce(&leaving, handler(host))}
	if *httpAddr != "" {
		l, err := net.Listen("tcp", *httpAddr)
		if err != nil {
			return err
		}
		fmt.Printf("serving HTTP on %s\n", l.Addr())
		go func() { fail <- web.Serve(l) }()
	}
	if *udpAddr != "" {
		// one socket a family: an answer from a wildcard dual-stack socket is fine too, but
		// separate ones keep IPv4 addresses unmapped in what is printed
		for _, network := range []string{"udp4", "udp6"} {
			c, err := listenUDP(network, *udpAddr)
			if err != nil {
				if network == "udp6" {
					continue // a kernel or pod without IPv6
				}
				return err
			}
			fmt.Printf("serving UDP on %s (%s)\n", c.LocalAddr(), network)
			go func() { fail <- udpEcho(c, host) }()
		}
	}
	if *tcpAddr != "" {
		l, err := net.Listen("tcp", *tcpAddr)
		if err != nil {
			return err
		}
		fmt.Printf("serving TCP on %s\n", l.Addr())
		go func() { fail <- tcpEcho(l, host) }()
	}
	select {
	case <-ctx.Done():
	case err := <-fail:
		return err
	}
	if *drain == 0 {
		return nil
	}
	leaving.Store(true)
	select {
	case <-time.After(*drain):
	case err := <-fail:
		return err
	}
	last, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	return web.Shutdown(last) // requests that are under way are answered
}

// announce makes h say that the server is about to end, once it is: it is not ready, and each connection ends with its
// next answer, so that no client sends a request on one that is being closed.
func announce(leaving *atomic.Bool, h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if leaving.Load() {
			w.Header().Set("Connection", "close")
			if r.URL.Path == "/healthz" {
				http.Error(w, "about to end", http.StatusServiceUnavailable)
				return
			}
		}
		h.ServeHTTP(w, r)
	})
}

func handler(host string) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("/healthz", func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "ok") })
	mux.HandleFunc("/hostname", func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, host) })
	mux.HandleFunc("/clientip", func(w http.ResponseWriter, r *http.Request) { _, _ = io.WriteString(w, r.RemoteAddr) })
	mux.HandleFunc("/bytes", func(w http.ResponseWriter, r *http.Request) {
		n, err := strconv.ParseInt(r.FormValue("n"), 10, 64)
		if err != nil || n < 0 {
			http.Error(w, "n must be a number", http.StatusBadRequest)
			return
		}
		_, _ = io.CopyN(w, zeros{}, n)
	})
	mux.HandleFunc("/echo", func(w http.ResponseWriter, r *http.Request) { _, _ = io.WriteString(w, r.FormValue("msg")) })
	return mux
}

// zeros is an endless source.
type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }

// answer is what a datagram or line is answered with.
func answer(msg, host string, from net.Addr) string {
	switch strings.TrimSpace(msg) {
	case "hostname":
		return host
	case "clientip":
		return from.String()
	}
	if rest, ok := strings.CutPrefix(msg, "who "); ok {
		number, _, _ := strings.Cut(strings.TrimSpace(rest), " ")
		return number + " " + host + "\n"
	}
	return msg
}

// soRxqOvfl makes the kernel say with each datagram how many the socket has dropped before (SO_RXQ_OVFL).
const soRxqOvfl = 40

// listenUDP opens a socket that counts what it has no room for, and has as much room as it may.
func listenUDP(network, addr string) (*net.UDPConn, error) {
	at, err := net.ResolveUDPAddr(network, addr)
	if err != nil {
		return nil, err
	}
	c, err := net.ListenUDP(network, at)
	if err != nil {
		return nil, err
	}
	_ = c.SetReadBuffer(1 << 20)
	raw, err := c.SyscallConn()
	if err == nil {
		err = errors.Join(raw.Control(func(fd uintptr) { err = syscall.SetsockoptInt(int(fd), syscall.SOL_SOCKET, soRxqOvfl, 1) }), err)
	}
	return c, err
}

func udpEcho(c *net.UDPConn, host string) error {
	buf, control := make([]byte, 65536), make([]byte, 64)
	for {
		n, oob, _, from, err := c.ReadMsgUDP(buf, control)
		if err != nil {
			if errors.Is(err, syscall.ECONNREFUSED) {
				continue
			}
			return err
		}
		msg := string(buf[:n])
		out := answer(msg, host, from)
		if dropped := droppedBefore(control[:oob]); dropped > 0 && strings.HasPrefix(msg, "who ") {
			out = fmt.Sprintf("%s %d\n", strings.TrimSpace(out), dropped)
		}
		_, _ = c.WriteToUDP([]byte(out), from)
	}
}

// droppedBefore is what the kernel says with a datagram: how many the socket had no room for by then. A damaged datagram
// counts for it too, so where there have been any, nothing is said.
func droppedBefore(control []byte) uint32 {
	messages, err := syscall.ParseSocketControlMessage(control)
	if err != nil {
		return 0
	}
	for _, m := range messages {
		if m.Header.Level == syscall.SOL_SOCKET && m.Header.Type == soRxqOvfl && len(m.Data) >= 4 && !damaged() {
			return binary.NativeEndian.Uint32(m.Data)
		}
	}
	return 0
}

// damaged: datagrams with a wrong checksum have come to this network namespace, or it does not say.
func damaged() bool {
	v4, err4 := os.ReadFile("/proc/self/net/snmp")
	v6, err6 := os.ReadFile("/proc/self/net/snmp6")
	return err4 != nil || err6 != nil || countedDamage(string(v4), string(v6))
}

// countedDamage reads the kernel's tables: of IPv4 a line of names and one of values, of IPv6 a name and its value in each.
func countedDamage(v4, v6 string) bool {
	var names []string
	for line := range strings.Lines(v4) {
		fields := strings.Fields(line)
		if len(fields) == 0 || fields[0] != "Udp:" {
			continue
		}
		if names == nil {
			names = fields
			continue
		}
		if i := slices.Index(names, "InCsumErrors"); i < 0 || i >= len(fields) || fields[i] != "0" {
			return true
		}
	}
	for line := range strings.Lines(v6) {
		if fields := strings.Fields(line); len(fields) == 2 && fields[0] == "Udp6InCsumErrors" && fields[1] != "0" {
			return true
		}
	}
	return false
}

func tcpEcho(l net.Listener, host string) error {
	for {
		c, err := l.Accept()
		if err != nil {
			return err
		}
		go func() {
			defer c.Close()
			r := bufio.NewReader(c)
			for {
				line, err := r.ReadString('\n')
				if line != "" {
					out := answer(line, host, c.RemoteAddr())
					if strings.TrimSpace(line) == "resent" {
						total, needless := resent(c)
						out = fmt.Sprint("resent ", total, " ", needless)
					}
					if !strings.HasSuffix(out, "\n") {
						out += "\n"
					}
					if _, err := io.WriteString(c, out); err != nil {
						return
					}
				}
				if err != nil {
					return
				}
			}
		}()
	}
}

// ask sends one message over an unconnected UDP socket or a TCP connection.
func ask(ctx context.Context, args []string) error {
	if len(args) != 3 {
		return errors.New("usage: toolbox ask NETWORK HOST:PORT MESSAGE")
	}
	deadline := time.Now().Add(3 * time.Second)
	buf := make([]byte, 65536)
	if strings.HasPrefix(args[0], "udp") {
		to, err := net.ResolveUDPAddr(args[0], args[1])
		if err != nil {
			return err
		}
		c, err := net.ListenUDP(args[0], nil)
		if err != nil {
			return err
		}
		defer c.Close()
		_ = c.SetDeadline(deadline)
		if _, err := c.WriteToUDP([]byte(args[2]), to); err != nil {
			return err
		}
		n, from, err := c.ReadFromUDPAddrPort(buf)
		if err != nil {
			return err
		}
		if want := to.AddrPort(); from.Addr().Unmap() != want.Addr().Unmap() || from.Port() != want.Port() {
			return fmt.Errorf("asked %s, %s answered", want, from)
		}
		fmt.Println(string(buf[:n]))
		return nil
	}
	c, err := (&net.Dialer{Deadline: deadline}).DialContext(ctx, args[0], args[1])
	if err != nil {
		return err
	}
	defer c.Close()
	_ = c.SetDeadline(deadline)
	if _, err := fmt.Fprintln(c, args[2]); err != nil {
		return err
	}
	n, err := c.Read(buf)
	if err != nil {
		return err
	}
	fmt.Println(strings.TrimSpace(string(buf[:n])))
	return nil
}

// Result of a probe.
type Result struct {
	Sent     int64 `json:"sent"`
	Received int64 `json:"received"`
	Lost     int64 `json:"lost"`
	// Overflowed messages or answers arrived, but server or probe was not given the CPU in time to read them; they are not
	// in Lost.
	Overflowed int64 `json:"overflowed,omitempty"`
	// Strays are answers to an unconnected socket from another address than it asked: of a backend that answered when its
	// connection had been forgotten.
	Strays     int64      `json:"strays,omitempty"`
	FirstStray *time.Time `json:"firstStray,omitempty"`
	// Resent is how many TCP segments either side sent again, Needless of how many of them the peer said that it had them
	// already (DSACK): a busy machine makes TCP impatient.
	Resent    int64      `json:"resent,omitempty"`
	Needless  int64      `json:"needless,omitempty"`
	FirstLost *time.Time `json:"firstLost,omitempty"` // when the first message without an answer was sent
	LastLost  *time.Time `json:"lastLost,omitempty"`
	LostRuns  int64      `json:"lostRuns,omitempty"` // of messages without an answer, one after the other
	MaxGapMS  float64    `json:"maxGapMs"`           // between answers
	MaxGapAt  time.Time  `json:"maxGapAt"`           // its end
	Error     string     `json:"error,omitempty"`
	// Servers are those that answered, with -who.
	Servers map[string]Server `json:"servers,omitempty"`
}

// Server is one that answered a probe.
type Server struct {
	Answers               int64     `json:"answers"`
	First, Last           time.Time // answer
	FirstAsked, LastAsked time.Time // of what it answered, when that was sent
	BehindMS              float64   // the longest that an answer took, of what was sent within a second of the last
}

// probe sends a numbered message every interval over one socket, and counts the answers. With tcp
// nothing can be lost while the connection lives: what was sent again and the longest gap are what tells.
func probe(ctx context.Context, args []string) error {
	fs := flag.NewFlagSet("probe", flag.ExitOnError)
	interval := fs.Duration("interval", time.Millisecond, "time between messages")
	total := fs.Duration("for", 10*time.Second, "how long to send")
	size := fs.Int("size", 0, "bytes of a message, if more than its number has")
	who := fs.Bool("who", false, "ask who answers")
	unconnected := fs.Bool("unconnected", false, "UDP: name the peer with each datagram, do not connect the socket")
	_ = fs.Parse(args)
	if fs.NArg() != 2 {
		return errors.New("usage: toolbox probe [-interval 1ms] [-for 10s] [-size 0] [-who] [-unconnected] udp|tcp HOST:PORT, or icmp4|icmp6 HOST")
	}
	dial := dial
	if *unconnected {
		dial = unconnectedTo
	}
	c, err := dial(ctx, fs.Arg(0), fs.Arg(1))
	if err != nil {
		return err
	}
	defer c.Close()
	r := run(ctx, c, message{size: *size, who: *who}, *interval, *total)
	out, err := json.Marshal(r)
	if err != nil {
		return err
	}
	fmt.Println(string(out))
	if r.Error != "" || r.Lost != 0 {
		os.Exit(2)
	}
	return nil
}

func dial(ctx context.Context, network, addr string) (net.Conn, error) {
	d := net.Dialer{Timeout: 5 * time.Second}
	switch network {
	case "icmp4":
		c, err := d.DialContext(ctx, "ip4:icmp", addr)
		return &pinger{Conn: c, request: 8, reply: 0}, err
	case "icmp6":
		c, err := d.DialContext(ctx, "ip6:ipv6-icmp", addr)
		return &pinger{Conn: c, request: 128, reply: 129}, err
	}
	return d.DialContext(ctx, network, addr)
}

// floating is an unconnected UDP socket that always sends to the same peer, and counts whom it hears besides.
type floating struct {
	*net.UDPConn
	peer   *net.UDPAddr
	strays atomic.Int64
	first  atomic.Pointer[time.Time] // stray
}

func unconnectedTo(_ context.Context, network, addr string) (net.Conn, error) {
	peer, err := net.ResolveUDPAddr(network, addr)
	if err != nil {
		return nil, err
	}
	c, err := net.ListenUDP(network, nil)
	return &floating{UDPConn: c, peer: peer}, err
}

func (f *floating) Write(b []byte) (int, error) { return f.WriteToUDP(b, f.peer) }

func (f *floating) Read(b []byte) (int, error) {
	for {
		n, from, err := f.ReadFromUDPAddrPort(b)
		if err != nil || from.Addr().Unmap() == f.peer.AddrPort().Addr().Unmap() && int(from.Port()) == f.peer.Port {
			return n, err
		}
		now := time.Now()
		f.first.CompareAndSwap(nil, &now)
		f.strays.Add(1)
	}
}

// pinger sends what is written as echo requests and reads what the replies bring.
type pinger struct {
	net.Conn
	request, reply byte // ICMP types
	seq            uint16
}

func (p *pinger) Write(b []byte) (int, error) {
	m := append(make([]byte, 8, 8+len(b)), b...)
	m[0] = p.request
	binary.BigEndian.PutUint16(m[4:], uint16(os.Getpid()))
	binary.BigEndian.PutUint16(m[6:], p.seq)
	p.seq++
	if p.request == 8 { // the kernel computes the other family's
		binary.BigEndian.PutUint16(m[2:], checksum(m))
	}
	if _, err := p.Conn.Write(m); err != nil {
		return 0, err
	}
	return len(b), nil
}

func (p *pinger) Read(b []byte) (int, error) {
	buf := make([]byte, 65536)
	for {
		n, _, err := p.Conn.(net.PacketConn).ReadFrom(buf) // Read would leave the IPv4 header in place
		if err != nil {
			return 0, err
		}
		if n >= 8 && buf[0] == p.reply && binary.BigEndian.Uint16(buf[4:]) == uint16(os.Getpid()) {
			return copy(b, buf[8:n]), nil
		}
	}
}

// checksum is that of RFC 1071.
func checksum(b []byte) uint16 {
	var sum uint32
	for i, x := range b {
		sum += uint32(x) << (8 * (1 - i%2))
	}
	for sum>>16 != 0 {
		sum = sum>>16 + sum&0xffff
	}
	return ^uint16(sum)
}

// entry is a message of a probe and its answer.
type entry struct {
	sent, answered time.Time
	by             string // who answered, where answers name that
	dropped        int64  // datagrams that the server's socket had had no room for when the message came
}

func (e entry) lost() bool { return e.answered.IsZero() }

// ledger is what was sent when and what of it was answered.
type ledger struct {
	mu       sync.Mutex
	entries  []entry // by the messages' numbers
	received int64
	last     time.Time // answer
	gap      time.Duration
	gapEnd   time.Time
	asked    chan struct{} // closed when the other side has said what it sent again

	resent, needless int64 // by the other side
	who              bool  // answers name who sent them
}

// message is what a probe sends besides the number.
type message struct {
	size int  // at least; 0: just the number
	who  bool // the server is to say its name
}

func (m message) text(number int) string {
	s := strconv.Itoa(number)
	if m.who {
		s = "who " + s
	}
	if pad := m.size - len(s) - 2; pad > 0 {
		s += " " + strings.Repeat("x", pad)
	}
	return s + "\n"
}

func (l *ledger) send() (number int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.entries = append(l.entries, entry{sent: time.Now()})
	return len(l.entries) - 1
}

func (l *ledger) answer(text string) error {
	head, rest, _ := strings.Cut(text, " ")
	l.mu.Lock()
	defer l.mu.Unlock()
	if head == "resent" {
		defer close(l.asked)
		_, err := fmt.Sscan(rest, &l.resent, &l.needless)
		return err
	}
	n, err := strconv.Atoi(head)
	if err != nil || n < 0 || n >= len(l.entries) {
		return fmt.Errorf("answer %q", text)
	}
	now := time.Now()
	if gap := now.Sub(l.last); gap > l.gap {
		l.gap, l.gapEnd = gap, now
	}
	l.last = now
	e := &l.entries[n]
	if !e.lost() {
		return nil // once more
	}
	e.answered = now
	l.received++
	if !l.who {
		return nil
	}
	name, dropped, _ := strings.Cut(rest, " ")
	if e.by = name; dropped != "" {
		if e.dropped, err = strconv.ParseInt(dropped, 10, 64); err != nil {
			return fmt.Errorf("answer %q", text)
		}
	}
	return nil
}

func (l *ledger) complete() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.received == int64(len(l.entries))
}

func (l *ledger) result() Result {
	l.mu.Lock()
	defer l.mu.Unlock()
	r := Result{Sent: int64(len(l.entries)), Received: l.received, MaxGapMS: float64(l.gap.Microseconds()) / 1000, MaxGapAt: l.gapEnd, Servers: l.servers()}
	for i := 0; i < len(l.entries); i++ {
		if !l.entries[i].lost() {
			continue
		}
		end := i
		for end < len(l.entries) && l.entries[end].lost() {
			end++
		}
		overflowed := l.overflowed(i, end)
		r.Overflowed += overflowed
		if lost := int64(end-i) - overflowed; lost > 0 {
			r.Lost += lost
			r.LostRuns++
			if r.FirstLost == nil {
				r.FirstLost = &l.entries[i].sent
			}
			r.LastLost = &l.entries[end-1].sent
		}
		i = end
	}
	return r
}

// servers are those that answered.
func (l *ledger) servers() map[string]Server {
	servers := map[string]Server{}
	for _, e := range l.entries {
		if e.by == "" {
			continue
		}
		s, known := servers[e.by]
		if !known {
			s.First, s.FirstAsked = e.answered, e.sent
		}
		s.Answers++
		s.LastAsked = e.sent
		if e.answered.Before(s.First) {
			s.First = e.answered
		}
		if e.answered.After(s.Last) {
			s.Last = e.answered
		}
		servers[e.by] = s
	}
	for _, e := range l.entries {
		s := servers[e.by]
		if took := float64(e.answered.Sub(e.sent).Microseconds()) / 1000; e.by != "" && s.LastAsked.Sub(e.sent) < time.Second && took > s.BehindMS {
			s.BehindMS = took
			servers[e.by] = s
		}
	}
	return servers
}

// overflowed is how many of the messages from..end, none of which was answered, may have been without room in the server's
// socket: as many as it counted between the answers before and after them, if those are the same server's.
func (l *ledger) overflowed(from, end int) int64 {
	if from == 0 || end == len(l.entries) || l.entries[from-1].by != l.entries[end].by {
		return 0
	}
	return max(0, min(int64(end-from), l.entries[end].dropped-l.entries[from-1].dropped))
}

func run(ctx context.Context, c net.Conn, m message, interval, total time.Duration) Result {
	l := &ledger{last: time.Now(), asked: make(chan struct{}), who: m.who}
	readErr := make(chan error, 1)
	go func() {
		s := bufio.NewScanner(c)
		s.Buffer(nil, 1<<17)
		for s.Scan() {
			if err := l.answer(s.Text()); err != nil {
				readErr <- err
				return
			}
		}
		readErr <- s.Err()
	}()
	ctx, cancel := context.WithTimeout(ctx, total)
	defer cancel()
	tick := time.NewTicker(interval)
	defer tick.Stop()
	problem := ""
sending:
	for {
		select {
		case <-ctx.Done():
			break sending
		case <-tick.C:
			if _, err := io.WriteString(c, m.text(l.send())); err != nil {
				problem = err.Error()
				break sending
			}
		}
	}
	deadline := time.Now().Add(2 * time.Second) // answers on their way
	for !l.complete() && time.Now().Before(deadline) {
		time.Sleep(time.Millisecond)
	}
	if _, ok := c.(*net.TCPConn); ok && problem == "" {
		_, _ = io.WriteString(c, "resent\n")
		select {
		case <-l.asked:
		case <-time.After(2 * time.Second):
			problem = "the server does not say what it had to send again"
		}
	}
	resent, needless := resent(c)
	overflowed := overflowed(c)
	_ = c.SetReadDeadline(time.Now())
	if err := <-readErr; err != nil && !errors.Is(err, os.ErrDeadlineExceeded) && problem == "" {
		problem = err.Error()
	}
	r := l.result()
	if f, ok := c.(*floating); ok {
		r.Strays, r.FirstStray = f.strays.Load(), f.first.Load()
	}
	r.Resent, r.Needless, r.Error = resent+l.resent, needless+l.needless, problem
	here := min(overflowed, r.Lost)
	r.Overflowed += here
	if r.Lost -= here; r.Lost == 0 {
		r.FirstLost, r.LastLost, r.LostRuns = nil, nil, 0
	}
	return r
}

// resent is the connection's count of segments sent again, and of those that the peer had already. 0 if c is no TCP
// connection.
func resent(c net.Conn) (total, needless int64) {
	t, ok := c.(*net.TCPConn)
	if !ok {
		return 0, 0
	}
	var info [256]byte // struct tcp_info of linux/tcp.h: tcpi_total_retrans, tcpi_dsack_dups
	sockopt(t, syscall.IPPROTO_TCP, syscall.TCP_INFO, info[:])
	return int64(binary.NativeEndian.Uint32(info[100:])), int64(binary.NativeEndian.Uint32(info[216:]))
}

// overflowed is the count of datagrams that did not fit into the socket's buffer. 0 where damaged ones may be among them.
func overflowed(c net.Conn) int64 {
	if damaged() {
		return 0
	}
	if p, ok := c.(*pinger); ok {
		c = p.Conn
	}
	if f, ok := c.(*floating); ok {
		c = f.UDPConn
	}
	const soMeminfo = 55
	var info [9 * 4]byte // SK_MEMINFO_VARS of linux/sock_diag.h; the last is SK_MEMINFO_DROPS
	if s, ok := c.(syscall.Conn); ok {
		sockopt(s, syscall.SOL_SOCKET, soMeminfo, info[:])
	}
	return int64(binary.NativeEndian.Uint32(info[32:]))
}

func sockopt(c syscall.Conn, level, option uintptr, value []byte) {
	raw, err := c.SyscallConn()
	if err != nil {
		return
	}
	size := uint32(len(value))
	_ = raw.Control(func(fd uintptr) {
		_, _, _ = syscall.Syscall6(syscall.SYS_GETSOCKOPT, fd, level, option, uintptr(unsafe.Pointer(&value[0])), uintptr(unsafe.Pointer(&size)), 0)
	})
}
