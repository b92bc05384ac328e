// SPDX-License-Identifier: Apache-2.0

package health

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"sync"
	"time"
)

// hello is the path that is asked for. The answer is 200 without a body.
const hello = "/hello"

// Responder answers probes on some addresses.
type Responder struct {
	port   uint16
	mux    *http.ServeMux
	server *http.Server

	mu        sync.Mutex
	closed    bool
	listeners map[netip.Addr]net.Listener
}

// NewResponder prepares a responder for a TCP port.
func NewResponder(port uint16, log *slog.Logger) *Responder {
	mux := http.NewServeMux()
	mux.HandleFunc("GET "+hello, func(http.ResponseWriter, *http.Request) {})
	// Whoever reaches the node reaches this port: nobody is waited for or listened to for long.
	const patience = 5 * time.Second
	return &Responder{port: port, mux: mux, listeners: map[netip.Addr]net.Listener{}, server: &http.Server{
		Handler: mux, ReadTimeout: patience, WriteTimeout: patience, IdleTimeout: 6 * patience, MaxHeaderBytes: 4 << 10,
		ErrorLog: slog.NewLogLogger(log.Handler(), slog.LevelDebug),
	}}
}

// Handle makes the responder answer something else, too: nodes let each other through to this port. To be called before
// Listen.
func (r *Responder) Handle(pattern string, h http.Handler) { r.mux.Handle(pattern, h) }

// Listen makes the responder answer on addrs and on no others. It goes on after an address that cannot be listened on.
func (r *Responder) Listen(addrs ...netip.Addr) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed {
		return http.ErrServerClosed
	}
	var errs []error
	for addr, l := range r.listeners {
		if !slices.Contains(addrs, addr) {
			errs = append(errs, l.Close())
			delete(r.listeners, addr)
		}
	}
	for _, addr := range addrs {
		if r.listeners[addr] != nil {
			continue
		}
		l, err := net.Listen("tcp", netip.AddrPortFrom(addr, r.port).String())
		if err != nil {
			errs = append(errs, fmt.Errorf("answer health probes (cluster-health-port): %w", err))
			continue
		}
		r.listeners[addr] = l
		go r.server.Serve(l) // ends with the listener
	}
	return errors.Join(errs...)
}

// Close ends the answering.
func (r *Responder) Close() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.closed = true
	return r.server.Close()
}
