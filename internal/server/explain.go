// SPDX-License-Identifier: Apache-2.0

package server

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"

	"github.com/lash-net/lash/api/agent"
)

// Explainer tells what becomes of a packet.
type Explainer interface {
	Explain(context.Context, agent.ExplainRequest) (agent.Explanation, error)
}

func (s *Server) explain(r *http.Request) (any, error) {
	var req agent.ExplainRequest
	if err := json.NewDecoder(http.MaxBytesReader(nil, r.Body, 1<<16)).Decode(&req); err != nil {
		return nil, problem{http.StatusBadRequest, fmt.Sprintf("explain: %v", err)}
	}
	out, err := s.cfg.Explain.Explain(r.Context(), req)
	if err != nil {
		return nil, problem{http.StatusUnprocessableEntity, err.Error()}
	}
	return out, nil
}
