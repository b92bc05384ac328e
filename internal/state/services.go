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

// ServicePortSpec is a port of a service as its object has it.
type ServicePortSpec struct {
	Name string
	model.L4
	NodePort uint16 // 0: none
}

// Service is a core/v1 Service.
type Service struct {
	Namespace, Name     string
	UID                 string
	Created             int64        // Unix seconds
	Type                string       // ClusterIP, NodePort, LoadBalancer, ExternalName
	ClusterIPs          []netip.Addr // empty if headless
	ExternalIPs         []netip.Addr
	LoadBalancerIPs     []netip.Addr // of the status, those that the node is to serve
	Ports               []ServicePortSpec
	PublishNotReady     bool
	InternalLocal       bool // internalTrafficPolicy: Local
	ExternalLocal       bool // externalTrafficPolicy: Local
	SessionAffinitySec  int  // 0: none
	HealthCheckNodePort uint16
	SourceRanges        []netip.Prefix
	Mode                string // by annotation: "snat", "dsr"; empty: the node's
	Algorithm           string // by annotation: "random", "maglev"; empty: the node's
	Only                string // by annotation: "ClusterIP", "NodePort", "LoadBalancer", the one kind of addresses that is served; empty: all
	Nodes               string // by annotation: the selector of the nodes that serve it; empty: all
	RangesDeny          bool   // the source ranges are kept out, not let in
	RangesBroken        bool   // some of them cannot be read: nobody is let in, or kept out, by them
}

// Key is "namespace/name".
func (r Service) Key() string { return r.Namespace + "/" + r.Name }

// Equal compares services.
func (r Service) Equal(o Service) bool {
	return r.Namespace == o.Namespace && r.Name == o.Name && r.UID == o.UID && r.Created == o.Created && r.Type == o.Type && r.PublishNotReady == o.PublishNotReady &&
		r.InternalLocal == o.InternalLocal && r.ExternalLocal == o.ExternalLocal && r.SessionAffinitySec == o.SessionAffinitySec &&
		r.HealthCheckNodePort == o.HealthCheckNodePort && r.Mode == o.Mode && r.Algorithm == o.Algorithm && r.RangesBroken == o.RangesBroken && r.RangesDeny == o.RangesDeny &&
		r.Only == o.Only && r.Nodes == o.Nodes &&
		slices.Equal(r.ClusterIPs, o.ClusterIPs) && slices.Equal(r.ExternalIPs, o.ExternalIPs) && slices.Equal(r.LoadBalancerIPs, o.LoadBalancerIPs) &&
		slices.Equal(r.Ports, o.Ports) && slices.Equal(r.SourceRanges, o.SourceRanges)
}

var serviceByName = byString("name", Service.Key)

// ServiceByName finds a service by "namespace/name".
func ServiceByName(key string) statedb.Query[Service] { return serviceByName.Query(key) }

func newServices(db *statedb.DB) (statedb.RWTable[Service], error) {
	return statedb.NewTableAny(db, "services",
		func() []string {
			return []string{"Name", "Type", "ClusterIPs", "ExternalIPs", "LoadBalancerIPs", "Ports"}
		},
		func(r Service) []string {
			ports := make([]string, len(r.Ports))
			for i, p := range r.Ports {
				ports[i] = strings.TrimPrefix(p.Name+":", ":") + strconv.Itoa(int(p.Port)) + "/" + model.ProtoName(p.Proto)
			}
			return []string{r.Key(), r.Type, joined(r.ClusterIPs), joined(r.ExternalIPs), joined(r.LoadBalancerIPs), strings.Join(ports, ",")}
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
	Hints                       *Hints // who should use it; nil: everybody
}

// Hints are the topology hints of an endpoint: names of zones and of nodes. Endpoints with the same hints share them.
type Hints struct{ Zones, Nodes []string }

// Equal compares hints.
func (h *Hints) Equal(o *Hints) bool {
	return h == o || h != nil && o != nil && slices.Equal(h.Zones, o.Zones) && slices.Equal(h.Nodes, o.Nodes)
}

// equal compares endpoints.
func (e SliceEndpoint) equal(o SliceEndpoint) bool {
	same := e.Hints.Equal(o.Hints)
	e.Hints, o.Hints = nil, nil
	return same && e == o
}

// EndpointSlice is a discovery.k8s.io/v1 EndpointSlice.
type EndpointSlice struct {
	Namespace, Name string
	UID             string
	Service         string // of label kubernetes.io/service-name
	IPv6            bool
	Derived         bool // Kubernetes makes it of the service and its pods, so that it follows both
	Ports           []SlicePort
	Endpoints       []SliceEndpoint
}

// Key is "namespace/name".
func (r EndpointSlice) Key() string { return r.Namespace + "/" + r.Name }

// ServiceKey is "namespace/name" of the service.
func (r EndpointSlice) ServiceKey() string { return r.Namespace + "/" + r.Service }

// Equal compares slices.
func (r EndpointSlice) Equal(o EndpointSlice) bool {
	return r.Namespace == o.Namespace && r.Name == o.Name && r.UID == o.UID && r.Service == o.Service && r.IPv6 == o.IPv6 && r.Derived == o.Derived &&
		slices.Equal(r.Ports, o.Ports) && slices.EqualFunc(r.Endpoints, o.Endpoints, SliceEndpoint.equal)
}

var sliceByName = byString("name", EndpointSlice.Key)

// SliceByName finds the slice "namespace/name".
func SliceByName(key string) statedb.Query[EndpointSlice] { return sliceByName.Query(key) }

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
		}, sliceByName, sliceByService)
}

// ServicePort is one port of a service for one family, ready for the datapath.
type ServicePort = model.ServicePort

// SplitServicePort is the row as a loop's key and value.
func SplitServicePort(r ServicePort) (uint32, model.ServicePort) { return r.ID, r }

var servicePortByID = statedb.Index[ServicePort, uint32]{
	Name:       "id",
	FromObject: func(r ServicePort) index.KeySet { return index.NewKeySet(index.Uint32(r.ID)) },
	FromKey:    index.Uint32,
	FromString: index.Uint32String,
	Unique:     true,
}

// ServicePortByID finds a service port by its number.
func ServicePortByID(id uint32) statedb.Query[ServicePort] { return servicePortByID.Query(id) }

var servicePortByAddress = statedb.Index[ServicePort, netip.Prefix]{
	Name:       "address",
	FromObject: func(r ServicePort) index.KeySet { return index.NewKeySet(keys(ServiceAddresses(r))...) },
	FromKey:    prefixKey,
}

// ServicePortsByAddress finds the service ports that a service's address has frontends of.
func ServicePortsByAddress(p netip.Prefix) statedb.Query[ServicePort] {
	return servicePortByAddress.Query(p)
}

// ServiceAddresses are the addresses of a service port's frontends that are services' alone: not a node's, and not
// external ones, which are somebody's whom Kubernetes does not know.
func ServiceAddresses(r ServicePort) (out []netip.Prefix) {
	for _, f := range r.Frontends {
		if p := netip.PrefixFrom(f.Addr, f.Addr.BitLen()); !f.Node && f.Type != model.TypeExternalIPs && !slices.Contains(out, p) {
			out = append(out, p)
		}
	}
	return out
}

func newServicePorts(db *statedb.DB) (statedb.RWTable[ServicePort], error) {
	return statedb.NewTableAny(db, "service-ports",
		func() []string { return []string{"ID", "Service", "Port", "Frontends", "Backends"} },
		func(r ServicePort) []string {
			fs := make([]string, len(r.Frontends))
			for i, f := range r.Frontends {
				fs[i] = f.FrontendKey.String() + " " + f.Type
			}
			return []string{strconv.FormatUint(uint64(r.ID), 10), r.Namespace + "/" + r.Name, r.Port, strings.Join(fs, ","), joined(r.Backends)}
		}, servicePortByID, servicePortByAddress)
}

// HealthCheck is a port on which load balancers ask whether this node has endpoints of a service.
type HealthCheck struct {
	Namespace, Name string // of the service
	Port            uint16
	Endpoints       int // of this node that are ready
}

// Key is "namespace/name" of the service.
func (r HealthCheck) Key() string { return r.Namespace + "/" + r.Name }

var healthCheckByService = byString("service", HealthCheck.Key)

// HealthCheckByService finds the health check of the service "namespace/name".
func HealthCheckByService(key string) statedb.Query[HealthCheck] {
	return healthCheckByService.Query(key)
}

func newHealthChecks(db *statedb.DB) (statedb.RWTable[HealthCheck], error) {
	return statedb.NewTableAny(db, "service-health-checks",
		func() []string { return []string{"Service", "Port", "LocalEndpoints"} },
		func(r HealthCheck) []string {
			return []string{r.Key(), strconv.Itoa(int(r.Port)), strconv.Itoa(r.Endpoints)}
		}, healthCheckByService)
}
