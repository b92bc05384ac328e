// SPDX-License-Identifier: Apache-2.0

package server

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"strings"

	"github.com/lash-net/lash/api/agent"
)

// Events streams what the node's programs tell.
type Events interface {
	// Listen calls each with whole frames until ctx or the stream ends, or each fails.
	Listen(ctx context.Context, each func(frames []byte) error) error
}

// Options are the settings that can be changed while the agent runs.
type Options interface {
	Options() []agent.Option
	// SetOptions changes all of them or, with an error that says what is wrong, none.
	SetOptions(map[string]string) error
}

// EndpointLog remembers what became of endpoints.
type EndpointLog interface {
	Of(id uint16) []agent.EndpointChange
}

// monitor streams frames for as long as the reader takes them.
func (s *Server) monitor(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Content-Type", "application/octet-stream")
	out := http.NewResponseController(w)
	err := out.Flush() // the reader knows now that it is heard
	if err == nil {
		err = s.cfg.Events.Listen(r.Context(), func(frames []byte) error {
			if _, err := w.Write(frames); err != nil {
				return err
			}
			return out.Flush()
		})
	}
	if err != nil {
		s.cfg.Log.Debug("events not delivered", "error", err)
	}
}

func (s *Server) options(*http.Request) (any, error) { return s.cfg.Options.Options(), nil }

func (s *Server) setOptions(r *http.Request) (any, error) {
	var want map[string]string
	if err := json.NewDecoder(http.MaxBytesReader(nil, r.Body, 1<<16)).Decode(&want); err != nil {
		return nil, problem{http.StatusBadRequest, fmt.Sprintf("options: %v", err)}
	}
	if err := s.cfg.Options.SetOptions(want); err != nil {
		return nil, problem{http.StatusBadRequest, err.Error()}
	}
	return s.cfg.Options.Options(), nil
}

func (s *Server) endpointLog(r *http.Request) (any, error) {
	id, err := endpointID(r)
	if err != nil {
		return nil, err
	}
	changes := s.cfg.EndpointLog.Of(id)
	if len(changes) == 0 {
		return nil, notFound("nothing is known of an endpoint %d on this node; 'lash endpoint list' shows those that are", id)
	}
	return changes, nil
}

// nodeMonitor is the status line about events.
func nodeMonitor(m agent.NodeMonitor) agent.Component {
	if m.CPUs == 0 {
		return disabled("")
	}
	c := agent.Component{State: agent.StateOk, Message: fmt.Sprintf("Listening for events on %d CPUs with %dx%d of shared memory", m.CPUs, m.Pages, m.PageSize)}
	if off := m.Off; len(off) > 0 {
		c.Message += " (" + strings.Join(off, ", ") + " off)"
	}
	return c
}
