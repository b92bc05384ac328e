// SPDX-License-Identifier: Apache-2.0

package state

import (
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/cilium/statedb"
	"github.com/cilium/statedb/index"

	"github.com/lash-net/lash/internal/model"
)

// ServicePort is a port of a service.
type ServicePort struct {
	Name string
	model.L4
}

// Service is a core/v1 Service.
type Service struct {
	Namespace, Name    string
	Type               string       // ClusterIP, NodePort, LoadBalancer, ExternalName
	ClusterIPs         []netip.Addr // empty if headless
	Ports              []ServicePort
	PublishNotReady    bool
	InternalLocal      bool // internalTrafficPolicy: Local
	SessionAffinitySec int  // 0: none
}

// Key is "namespace/name".
func (r Service) Key() string { return r.Namespace + "/" + r.Name }

// Equal compares services.
func (r Service) Equal(o Service) bool {
	return r.Namespace == o.Namespace && r.Name == o.Name && r.Type == o.Type && r.PublishNotReady == o.PublishNotReady &&
		r.InternalLocal == o.InternalLocal && r.SessionAffinitySec == o.SessionAffinitySec &&
		slices.Equal(r.ClusterIPs, o.ClusterIPs) && slices.Equal(r.Ports, o.Ports)
}

// ServiceByName finds the service "namespace/name".
func ServiceByName(key string) statedb.Query[Service] { return serviceByName.Query(key) }

var serviceByName = byString("name", Service.Key)

func newServices(db *statedb.DB) (statedb.RWTable[Service], error) {
	return statedb.NewTableAny(db, "services",
		func() []string { return []string{"Name", "Type", "ClusterIPs", "Ports"} },
		func(r Service) []string {
			ports := make([]string, len(r.Ports))
			for i, p := range r.Ports {
				ports[i] = strings.TrimPrefix(p.Name+":", ":") + strconv.Itoa(int(p.Port)) + "/" + model.ProtoName(p.Proto)
			}
			return []string{r.Key(), r.Type, joined(r.ClusterIPs), strings.Join(ports, ",")}
		}, serviceByName)
}

// SlicePort is a port of an EndpointSlice; Port 0 stands for none.
type SlicePort struct {
	Name string
	model.L4
}

// SliceEndpoint is one endpoint of an EndpointSlice.
type SliceEndpoint struct {
	Addr                        netip.Addr
	Ready, Serving, Terminating bool
	Node                        string
}

// EndpointSlice is a discovery.k8s.io/v1 EndpointSlice.
type EndpointSlice struct {
	Namespace, Name string
	Service         string // of label kubernetes.io/service-name
	IPv6            bool
	Ports           []SlicePort
	Endpoints       []SliceEndpoint
}

// Key is "namespace/name".
func (r EndpointSlice) Key() string { return r.Namespace + "/" + r.Name }

// ServiceKey is "namespace/name" of the service.
func (r EndpointSlice) ServiceKey() string { return r.Namespace + "/" + r.Service }

// Equal compares slices.
func (r EndpointSlice) Equal(o EndpointSlice) bool {
	return r.Namespace == o.Namespace && r.Name == o.Name && r.Service == o.Service && r.IPv6 == o.IPv6 &&
		slices.Equal(r.Ports, o.Ports) && slices.Equal(r.Endpoints, o.Endpoints)
}

var sliceByService = nonUnique(byString("service", EndpointSlice.ServiceKey))

// SlicesByService finds the slices of the service "namespace/name".
func SlicesByService(key string) statedb.Query[EndpointSlice] { return sliceByService.Query(key) }

func newSlices(db *statedb.DB) (statedb.RWTable[EndpointSlice], error) {
	return statedb.NewTableAny(db, "endpointslices",
		func() []string { return []string{"Name", "Service", "Ports", "Endpoints"} },
		func(r EndpointSlice) []string {
			ports := make([]string, len(r.Ports))
			for i, p := range r.Ports {
				ports[i] = strings.TrimPrefix(p.Name+":", ":") + strconv.Itoa(int(p.Port)) + "/" + model.ProtoName(p.Proto)
			}
			eps := make([]string, len(r.Endpoints))
			for i, e := range r.Endpoints {
				eps[i] = e.Addr.String()
				if !e.Ready {
					eps[i] += "(not ready)"
				}
			}
			return []string{r.Key(), r.Service, strings.Join(ports, ","), strings.Join(eps, ",")}
		}, byString("name", EndpointSlice.Key), sliceByService)
}

// Frontend is an address that is translated to backends.
type Frontend struct {
	Key   model.Frontend
	Entry model.FrontendEntry
}

// Split is the row as a loop's key and value.
func (r Frontend) Split() (model.Frontend, model.FrontendEntry) { return r.Key, r.Entry }

// Equal compares frontends.
func (r Frontend) Equal(o Frontend) bool { return r.Key == o.Key && r.Entry.Equal(o.Entry) }

func frontendKey(f model.Frontend) index.Key {
	a := f.Addr.As16()
	return append(index.Key(a[:]), byte(f.Port>>8), byte(f.Port), f.Proto, f.Scope)
}

func newFrontends(db *statedb.DB) (statedb.RWTable[Frontend], error) {
	return statedb.NewTableAny(db, "frontends",
		func() []string { return []string{"ID", "Frontend", "Type", "Service", "Port", "Backends"} },
		func(r Frontend) []string {
			return []string{strconv.FormatUint(uint64(r.Entry.ID), 10), r.Key.String(), r.Entry.Type,
				r.Entry.Namespace + "/" + r.Entry.Name, r.Entry.PortName, joined(r.Entry.Backends)}
		},
		statedb.Index[Frontend, model.Frontend]{
			Name:       "frontend",
			FromObject: func(r Frontend) index.KeySet { return index.NewKeySet(frontendKey(r.Key)) },
			FromKey:    frontendKey,
			Unique:     true,
		})
}
