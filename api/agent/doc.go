// SPDX-License-Identifier: Apache-2.0

// Package agent is the JSON that the agent's socket speaks: what GET /v1/... answers and what the CLI prints. It owns
// the field names, and nothing else; every value is true of the running agent at the moment of the request.
//
//	GET /v1/status            Status
//	GET /v1/status?why        Status with Why
//	GET /v1/status?nodes      Status with the health of every node
//	GET /v1/health            ClusterHealth with every node
//	GET /v1/endpoints         []model.Endpoint
//	GET /v1/endpoints/ID      model.Endpoint
//	GET /v1/endpoints/ID/log  []EndpointChange
//	GET /v1/config            []Option
//	PATCH /v1/config          map[string]string in, []Option out
//	GET /v1/monitor           a stream of events: frames of package monitor
//	GET /v1/ip                []IP
//	GET /v1/nodes             []model.Node
//	GET /v1/services          []Service
//	GET /v1/bpf/NAME          Table; NAME is net, endpoint, ct, ipcache, lb, nat or metrics
//	GET /v1/db                []TableInfo
//	GET /v1/db/TABLE          Table
//	POST /v1/explain          ExplainRequest in, Explanation out
//	GET /v1/version           Version
//
// An error is answered with its status code and an Error.
package agent

// Socket is where the agent listens.
const Socket = "/var/run/lash/lash.sock"
