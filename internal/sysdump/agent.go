// SPDX-License-Identifier: Apache-2.0

package sysdump

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"
	"time"

	"github.com/lash-net/lash/api/agent"
	"github.com/lash-net/lash/internal/model"
)

// partLimit is how long one part of a node may take.
const partLimit = 20 * time.Second

// Ask gets a path of the agent's API.
type Ask func(ctx context.Context, path string, out any) error

// answers are the files made of single answers of the agent.
var answers = []struct{ name, path string }{
	{"status.json", "/v1/status?nodes"}, {"why.json", "/v1/status?why"}, {"version.json", "/v1/version"}, {"config.json", "/v1/config"},
	{"endpoints.json", "/v1/endpoints"}, {"identities.json", "/v1/identities"}, {"ip.json", "/v1/ip"}, {"nodes.json", "/v1/nodes"},
	{"services.json", "/v1/services"}, {"health.json", "/v1/health"},
}

// bpfTables are what `lash bpf NAME list` shows; the last two are long.
var bpfTables = []string{"net", "endpoint", "device", "ipcache", "ipmasq", "tunnel", "lb", "socket", "metrics", "nat-top", "ct", "nat"}

// Agent collects what the agent of this node knows and has in the kernel. If it does not answer, that is one problem, not
// one for each file. quick leaves out the connections; more are files that the caller makes of answers.
func (a *Archive) Agent(ctx context.Context, ask Ask, quick bool, more ...Part) {
	var alive agent.Version
	first, cancel := context.WithTimeout(ctx, partLimit)
	err := ask(first, "/v1/version", &alive)
	cancel()
	if err != nil {
		a.Fail("agent", err)
		return
	}
	for _, x := range answers {
		a.get(ctx, ask, x.name, x.path)
	}
	tables := bpfTables
	if quick {
		tables = tables[:len(tables)-3]
	}
	for _, t := range tables {
		a.get(ctx, ask, "bpf/"+t+".json", "/v1/bpf/"+t)
	}
	for _, p := range more {
		a.Collect(ctx, partLimit, p)
	}
	var db []agent.TableInfo
	if err := ask(ctx, "/v1/db", &db); err != nil {
		a.Fail("db", err)
	}
	for _, t := range db {
		a.get(ctx, ask, "db/"+t.Name+".json", "/v1/db/"+t.Name)
	}
	var eps []model.Endpoint
	if err := ask(ctx, "/v1/endpoints", &eps); err != nil {
		a.Fail("endpoint-log", err)
	}
	for _, ep := range eps {
		a.get(ctx, ask, fmt.Sprintf("endpoint-log/%d.json", ep.ID), fmt.Sprintf("/v1/endpoints/%d/log", ep.ID))
	}
}

// get adds one answer of the agent. One of another version may not know what is asked for.
func (a *Archive) get(ctx context.Context, ask Ask, name, path string) {
	a.Collect(ctx, partLimit, Part{name, func(ctx context.Context) ([]byte, error) {
		var v json.RawMessage
		if err := ask(ctx, path, &v); err != nil {
			return nil, fmt.Errorf("GET %s: %s", path, strings.TrimSpace(err.Error()))
		}
		return v, nil
	}})
}
