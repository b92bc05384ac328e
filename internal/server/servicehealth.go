// SPDX-License-Identifier: Apache-2.0

package server

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"strconv"
	"sync"
	"time"

	"github.com/lash-net/lash/internal/state"
)

// ServiceHealth answers load balancers that ask, on the healthCheckNodePort of a service, whether this node has ready
// endpoints of it, as kube-proxy does.
type ServiceHealth struct {
	t       *state.Tables
	log     *slog.Logger
	healthy func() bool // the node serves services at all

	mu        sync.Mutex
	listeners map[uint16]*http.Server
}

// NewServiceHealth answers from the table of health checks.
func NewServiceHealth(t *state.Tables, healthy func() bool, log *slog.Logger) *ServiceHealth {
	return &ServiceHealth{t: t, log: log, healthy: healthy, listeners: map[uint16]*http.Server{}}
}

// Sync listens on the ports there are and on no others. A port that cannot be had is tried again by the next Sync.
func (s *ServiceHealth) Sync(context.Context) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	want := map[uint16]bool{}
	for c := range s.t.HealthChecks.All(s.t.DB.ReadTxn()) {
		want[c.Port] = true
	}
	for port, srv := range s.listeners {
		if !want[port] {
			srv.Close()
			delete(s.listeners, port)
		}
	}
	var errs []error
	for port := range want {
		if s.listeners[port] != nil {
			continue
		}
		l, err := net.Listen("tcp", net.JoinHostPort("", strconv.Itoa(int(port))))
		if err != nil {
			errs = append(errs, fmt.Errorf("healthCheckNodePort: %w", err))
			continue
		}
		srv := &http.Server{Handler: s.handler(port), ReadHeaderTimeout: 5 * time.Second}
		s.listeners[port] = srv
		go func() {
			if err := srv.Serve(l); !errors.Is(err, http.ErrServerClosed) {
				s.log.Warn("health check of a service is not answered", "port", port, "error", err)
				s.mu.Lock()
				defer s.mu.Unlock()
				if s.listeners[port] == srv {
					delete(s.listeners, port)
				}
			}
		}()
	}
	return errors.Join(errs...)
}

// Close stops listening.
func (s *ServiceHealth) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	for port, srv := range s.listeners {
		srv.Close()
		delete(s.listeners, port)
	}
	return nil
}

// handler answers what is true at the time of the question.
func (s *ServiceHealth) handler(port uint16) http.Handler {
	type name struct {
		Namespace string `json:"namespace"`
		Name      string `json:"name"`
	}
	return http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		var check state.HealthCheck
		for c := range s.t.HealthChecks.All(s.t.DB.ReadTxn()) {
			if c.Port == port {
				check = c
			}
		}
		healthy := s.healthy()
		w.Header().Set("Content-Type", "application/json")
		w.Header().Set("X-Content-Type-Options", "nosniff")
		w.Header().Set("X-Load-Balancing-Endpoint-Weight", strconv.Itoa(check.Endpoints))
		if check.Endpoints == 0 || !healthy {
			w.WriteHeader(http.StatusServiceUnavailable)
		}
		json.NewEncoder(w).Encode(struct {
			Service             name `json:"service"`
			LocalEndpoints      int  `json:"localEndpoints"`
			ServiceProxyHealthy bool `json:"serviceProxyHealthy"`
		}{name{check.Namespace, check.Name}, check.Endpoints, healthy})
	})
}

// ServeProxyHealth answers as kube-proxy does, until ctx ends: /livez whether services are served, and /healthz whether load
// balancers should send new connections here besides, which they should not while the node is on its way out (KEP-3836).
func ServeProxyHealth(ctx context.Context, addr string, healthy, eligible func() bool) error {
	l, err := (&net.ListenConfig{}).Listen(ctx, "tcp", addr)
	if err != nil {
		return fmt.Errorf("kube-proxy-replacement-healthz-bind-address: %w", err)
	}
	srv := &http.Server{Handler: proxyHealth(healthy, eligible), ReadHeaderTimeout: 5 * time.Second}
	defer context.AfterFunc(ctx, func() { srv.Close() })()
	if err := srv.Serve(l); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

func proxyHealth(healthy, eligible func() bool) http.Handler {
	mux := http.NewServeMux()
	answer := func(pattern string, ok func() bool, more func() string) {
		mux.HandleFunc("GET "+pattern, func(w http.ResponseWriter, _ *http.Request) {
			now := time.Now().UTC()
			w.Header().Set("Content-Type", "application/json")
			w.Header().Set("X-Content-Type-Options", "nosniff")
			if !ok() {
				w.WriteHeader(http.StatusServiceUnavailable)
			}
			fmt.Fprintf(w, "{\"lastUpdated\": %q,\"currentTime\": %q%s}", now, now, more())
		})
	}
	answer("/healthz", func() bool { return healthy() && eligible() }, func() string { return fmt.Sprintf(", \"nodeEligible\": %v", eligible()) })
	answer("/livez", healthy, func() string { return "" })
	return mux
}
