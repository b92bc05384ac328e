// SPDX-License-Identifier: Apache-2.0

package server

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/netip"

	"github.com/lash-net/lash/api/agent"
)

// Prefilter is the list of sources whose packets devices drop.
type Prefilter interface {
	Prefilter() ([]netip.Prefix, error)
	ChangePrefilter(add, remove []netip.Prefix) error
}

func (s *Server) prefilter(*http.Request) (any, error) {
	list, err := s.cfg.Prefilter.Prefilter()
	return append([]netip.Prefix{}, list...), err
}

func (s *Server) setPrefilter(r *http.Request) (any, error) {
	var change agent.PrefilterChange
	if err := json.NewDecoder(http.MaxBytesReader(nil, r.Body, 1<<20)).Decode(&change); err != nil {
		return nil, problem{http.StatusBadRequest, fmt.Sprintf("prefilter: %v", err)}
	}
	for _, p := range change.Add {
		if err := s.cutsOff(p); err != nil {
			return nil, problem{http.StatusUnprocessableEntity, err.Error()}
		}
	}
	if err := s.cfg.Prefilter.ChangePrefilter(change.Add, change.Remove); err != nil {
		return nil, problem{http.StatusUnprocessableEntity, err.Error()}
	}
	return s.prefilter(r)
}

// cutsOff tells of a prefix that it contains a node of the cluster, with which this one could not speak any more.
func (s *Server) cutsOff(p netip.Prefix) error {
	for n := range s.cfg.Tables.Nodes.All(s.cfg.Tables.DB.ReadTxn()) {
		for _, a := range n.Addrs {
			if p.Contains(a) {
				return fmt.Errorf("%s contains %s, the address of node %s, which would be cut off: give smaller prefixes", p, a, n.Name)
			}
		}
	}
	return nil
}
