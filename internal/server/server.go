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
	"net/http/pprof"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/cilium/statedb"

	"github.com/lash-net/lash/api/agent"
	"github.com/lash-net/lash/internal/model"
	"github.com/lash-net/lash/internal/state"
)

// Datapath dumps what is in the kernel; name is one of Dumps.
type Datapath interface {
	Dump(name string) (columns []string, rows [][]string, err error)
}

// Dumps are the names that a Datapath knows.
var Dumps = []string{"net", "endpoint", "device", "ct", "ipcache", "ipmasq", "tunnel", "lb", "lb-backends", "lb-maglev", "lb-affinity", "lb-source-ranges", "nat", "nat-top", "socket", "metrics"}

// Config is what the server answers from.
type Config struct {
	Tables   *state.Tables
	Facts    func() Facts
	Datapath Datapath
	Events   Events
	Options  Options
	Explain  Explainer
	// Prefilter is what devices drop before the kernel sees it.
	Prefilter Prefilter
	// EndpointLog may be asked from the start.
	EndpointLog EndpointLog
	Log         *slog.Logger
}

// Server answers requests.
type Server struct {
	cfg Config
	mux *http.ServeMux
}

// New prepares a server; Serve and ServeHealth run it.
func New(cfg Config) *Server {
	s := &Server{cfg: cfg, mux: http.NewServeMux()}
	s.handle("GET /v1/status", s.status)
	s.handle("GET /v1/endpoints", s.endpoints)
	s.handle("GET /v1/endpoints/{id}", s.endpoint)
	s.handle("GET /v1/endpoints/{id}/log", s.endpointLog)
	s.handle("GET /v1/config", s.options)
	s.handle("PATCH /v1/config", s.setOptions)
	s.mux.HandleFunc("GET /v1/monitor", s.monitor)
	s.handle("POST /v1/explain", s.explain)
	s.handle("GET /v1/prefilter", s.prefilter)
	s.handle("PATCH /v1/prefilter", s.setPrefilter)
	s.handle("GET /v1/ip", s.ips)
	s.handle("GET /v1/identities", s.identities)
	s.handle("GET /v1/identities/{id}", s.identity)
	s.handle("GET /v1/nodes", func(*http.Request) (any, error) { return all(s, cfg.Tables.Nodes), nil })
	s.handle("GET /v1/services", s.services)
	s.handle("GET /v1/health", s.health)
	s.handle("GET /v1/bpf/{name}", s.bpf)
	s.handle("GET /v1/db", s.db)
	s.handle("GET /v1/db/{table}", s.table)
	s.mux.HandleFunc("GET /debug/pprof/", pprof.Index)
	s.mux.HandleFunc("GET /debug/pprof/profile", pprof.Profile)
	s.mux.HandleFunc("GET /debug/pprof/trace", pprof.Trace)
	s.handle("GET /v1/version", func(*http.Request) (any, error) { return cfg.Facts().Version, nil })
	return s
}

// ServeHTTP implements http.Handler.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) { s.mux.ServeHTTP(w, r) }

// Serve listens on the unix socket until ctx ends. A socket that a dead agent left is replaced. Only root may connect.
func (s *Server) Serve(ctx context.Context, socket string) error {
	if err := os.MkdirAll(filepath.Dir(socket), 0o755); err != nil {
		return fmt.Errorf("listen on %s: %w", socket, err)
	}
	if err := os.Remove(socket); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("listen on %s: %w", socket, err)
	}
	l, err := net.Listen("unix", socket)
	if err != nil {
		return err
	}
	if err := os.Chmod(socket, 0o600); err != nil {
		return errors.Join(fmt.Errorf("listen on %s: %w", socket, err), l.Close())
	}
	return serve(ctx, l, s)
}

// ServeHealth answers /healthz on the loopback address with 200 when the agent is ready and 503 and the reason when not.
func (s *Server) ServeHealth(ctx context.Context, port int) error {
	var lc net.ListenConfig
	l, err := lc.Listen(ctx, "tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(port)))
	if err != nil {
		return fmt.Errorf("listen for health checks (agent-health-port): %w", err)
	}
	return serve(ctx, l, s.Health())
}

// Health is the handler of /healthz.
func (s *Server) Health() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) {
		f := s.cfg.Facts()
		if !f.Ready {
			http.Error(w, f.NotReady, http.StatusServiceUnavailable)
			return
		}
		fmt.Fprintln(w, "ok")
	})
	return mux
}

// grace is how long requests that are being answered may take when the agent ends: nobody needs more of an agent that
// goes away, and its successor waits for it.
const grace = 100 * time.Millisecond

func serve(ctx context.Context, l net.Listener, h http.Handler) error {
	srv := &http.Server{Handler: h, ReadHeaderTimeout: 5 * time.Second}
	stopped := make(chan struct{})
	go func() {
		defer close(stopped)
		<-ctx.Done()
		ending, cancel := context.WithTimeout(context.WithoutCancel(ctx), grace)
		defer cancel()
		if srv.Shutdown(ending) != nil {
			srv.Close()
		}
	}()
	err := srv.Serve(l)
	if !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("serve %s: %w", l.Addr(), err)
	}
	<-stopped
	return nil
}

// problem is an error with a status code.
type problem struct {
	code int
	text string
}

func (p problem) Error() string { return p.text }

func notFound(format string, args ...any) error {
	return problem{http.StatusNotFound, fmt.Sprintf(format, args...)}
}

func (s *Server) handle(pattern string, f func(*http.Request) (any, error)) {
	s.mux.HandleFunc(pattern, func(w http.ResponseWriter, r *http.Request) {
		body, err := f(r)
		code := http.StatusOK
		if err != nil {
			code = http.StatusInternalServerError
			var p problem
			if errors.As(err, &p) {
				code = p.code
			}
			body = agent.Error{Error: err.Error()}
		}
		b, err := json.Marshal(body)
		if err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(code)
		if _, err := w.Write(append(b, '\n')); err != nil {
			s.cfg.Log.Debug("answer not delivered", "path", r.URL.Path, "error", err)
		}
	})
}

func (s *Server) status(r *http.Request) (any, error) {
	f := s.cfg.Facts()
	st := Status(s.cfg.Tables, f, time.Now().UTC())
	if r.URL.Query().Has("why") {
		st.Why = f.Why
	}
	if r.URL.Query().Has("nodes") {
		st.ClusterHealth = clusterHealth(s.cfg.Tables, s.cfg.Tables.DB.ReadTxn(), f, everyNode)
	}
	return st, nil
}

// all is the table's rows; an empty table is [] in JSON.
func all[Row any](s *Server, tbl statedb.Table[Row]) []Row {
	return append([]Row{}, state.Rows(s.cfg.Tables.DB.ReadTxn(), tbl)...)
}

func (s *Server) endpoints(*http.Request) (any, error) { return all(s, s.cfg.Tables.Endpoints), nil }

func endpointID(r *http.Request) (uint16, error) {
	id, err := strconv.ParseUint(r.PathValue("id"), 10, 16)
	if err != nil || id == 0 {
		return 0, problem{http.StatusBadRequest, fmt.Sprintf("endpoint %q is not a number from 1 to 65535; 'lash endpoint list' shows them", r.PathValue("id"))}
	}
	return uint16(id), nil
}

func (s *Server) endpoint(r *http.Request) (any, error) {
	id, err := endpointID(r)
	if err != nil {
		return nil, err
	}
	ep, _, ok := s.cfg.Tables.Endpoints.Get(s.cfg.Tables.DB.ReadTxn(), state.EndpointByID(id))
	if !ok {
		return nil, notFound("no endpoint %d on this node; 'lash endpoint list' shows those that are", id)
	}
	return ep, nil
}

func (s *Server) ips(*http.Request) (any, error) {
	t := s.cfg.Tables
	txn := t.DB.ReadTxn()
	rows := []agent.IP{}
	for p, e := range t.Addresses(txn) {
		rows = append(rows, agent.IP{Prefix: p, Identity: e.Identity, Labels: s.labels(txn, e.Identity), Node: e.Node, Source: e.Source})
	}
	slices.SortFunc(rows, func(a, b agent.IP) int { return a.Prefix.Compare(b.Prefix) })
	return rows, nil
}

// labels are those behind an identity; of one that is not known (yet), its number.
func (s *Server) labels(txn statedb.ReadTxn, id model.Identity) []string {
	if fixed := id.FixedLabels(); fixed != nil {
		return fixed
	}
	if row, _, ok := s.cfg.Tables.Identities.Get(txn, state.IdentityByID(id)); ok {
		return row.Labels.List()
	}
	return []string{id.String()}
}

func (s *Server) identities(*http.Request) (any, error) {
	txn := s.cfg.Tables.DB.ReadTxn()
	rows := []agent.Identity{}
	for _, id := range model.FixedIdentities() {
		rows = append(rows, agent.Identity{ID: id, Labels: id.FixedLabels()})
	}
	for r := range s.cfg.Tables.Identities.All(txn) {
		rows = append(rows, agent.Identity{ID: r.ID, Labels: r.Labels.List()})
	}
	slices.SortFunc(rows, func(a, b agent.Identity) int { return int(a.ID) - int(b.ID) })
	return rows, nil
}

func (s *Server) identity(r *http.Request) (any, error) {
	id, err := strconv.ParseUint(r.PathValue("id"), 10, 32)
	if err != nil {
		return nil, problem{http.StatusBadRequest, fmt.Sprintf("identity %q is not a number; 'lash identity list' shows them", r.PathValue("id"))}
	}
	if fixed := model.Identity(id).FixedLabels(); fixed != nil {
		return agent.Identity{ID: model.Identity(id), Labels: fixed}, nil
	}
	row, _, ok := s.cfg.Tables.Identities.Get(s.cfg.Tables.DB.ReadTxn(), state.IdentityByID(model.Identity(id)))
	if !ok {
		return nil, notFound("no identity %d; 'lash identity list' shows those that are", id)
	}
	return agent.Identity{ID: row.ID, Labels: row.Labels.List()}, nil
}

// services are one row a frontend; those of a service port have its number in common.
func (s *Server) services(*http.Request) (any, error) {
	rows := []agent.Service{}
	for _, p := range all(s, s.cfg.Tables.ServicePorts) {
		backends := []agent.Backend{}
		for _, b := range p.Backends {
			if b.Active() || b.Terminating {
				backends = append(backends, agent.Backend{Addr: b.Addr, Port: b.Port, Proto: p.Proto, State: b.State(), Active: b.Active(), Local: b.Local})
			}
		}
		for _, f := range p.Frontends {
			rows = append(rows, agent.Service{ID: p.ID, Frontend: f.FrontendKey.String(), Type: f.Type, Namespace: p.Namespace, Name: p.Name, PortName: p.Port,
				Affinity: p.Affinity, Flags: f.Flags(), Backends: backends, SourceRanges: sourceRanges(f, p)})
		}
	}
	return rows, nil
}

func sourceRanges(f model.Frontend, p model.ServicePort) []netip.Prefix {
	if !f.Ranges {
		return nil
	}
	return p.Ranges
}

func (s *Server) bpf(r *http.Request) (any, error) {
	name := r.PathValue("name")
	if !slices.Contains(Dumps, name) {
		return nil, notFound("no BPF table %q; there are %s", name, strings.Join(Dumps, ", "))
	}
	columns, rows, err := s.cfg.Datapath.Dump(name)
	if err != nil {
		return nil, err
	}
	return agent.Table{Name: name, Columns: columns, Rows: append([][]string{}, rows...)}, nil
}

func (s *Server) db(*http.Request) (any, error) {
	txn := s.cfg.Tables.DB.ReadTxn()
	rows := []agent.TableInfo{}
	for _, m := range s.cfg.Tables.DB.GetTables(txn) {
		complete, _ := m.Initialized(txn)
		rows = append(rows, agent.TableInfo{Name: m.Name(), Rows: m.NumObjects(txn), Complete: complete})
	}
	slices.SortFunc(rows, func(a, b agent.TableInfo) int { return strings.Compare(a.Name, b.Name) })
	return rows, nil
}

func (s *Server) table(r *http.Request) (any, error) {
	txn := s.cfg.Tables.DB.ReadTxn()
	name := r.PathValue("table")
	var names []string
	for _, m := range s.cfg.Tables.DB.GetTables(txn) {
		if m.Name() != name {
			names = append(names, m.Name())
			continue
		}
		tbl := statedb.AnyTable{Meta: m}
		out := agent.Table{Name: name, Columns: tbl.TableHeader(), Rows: [][]string{}}
		for row := range tbl.All(txn) {
			out.Rows = append(out.Rows, tbl.TableRow(row))
		}
		return out, nil
	}
	slices.Sort(names)
	return nil, notFound("no table %q; there are %s", name, strings.Join(names, ", "))
}
