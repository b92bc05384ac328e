// SPDX-License-Identifier: Apache-2.0

package state

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/cilium/statedb"
	"github.com/cilium/statedb/index"
)

// Tables is the database of one agent. The comment of each table says who writes it.
type Tables struct {
	DB *statedb.DB

	NodeObjects   statedb.RWTable[NodeObject]    // k8s: Nodes and CiliumNodes as read
	Local         statedb.RWTable[Node]          // agent: this node, one row, known before the API server answers
	Nodes         statedb.RWTable[Node]          // node: the merged nodes of the cluster
	IPCache       statedb.RWTable[IPCache]       // node: who is behind a prefix
	Routes        statedb.RWTable[Route]         // node: wanted routes
	Warnings      statedb.RWTable[Warning]       // node, ipam, service: what a person should know
	NonMasquerade statedb.RWTable[NonMasquerade] // agent: destinations outside of the cluster that see pods' own addresses
	TunnelPaths   statedb.RWTable[TunnelPath]    // agent: what the kernel has of the way into the tunnel
	Devices       statedb.RWTable[Device]        // agent: devices that programs are attached to
	Endpoints     statedb.RWTable[Endpoint]      // endpoint: pods of this node
	Pods          statedb.RWTable[Pod]           // k8s: pods of this node
	Namespaces    statedb.RWTable[Namespace]     // k8s
	Services      statedb.RWTable[Service]       // k8s
	Slices        statedb.RWTable[EndpointSlice] // k8s

	ServicePorts statedb.RWTable[ServicePort] // service: what the datapath is to serve
	HealthChecks statedb.RWTable[HealthCheck] // service: ports for load balancers' questions

	Identities      statedb.RWTable[Identity]       // k8s: CiliumIdentities
	PodIdentities   statedb.RWTable[PodIdentity]    // identity: of the pods of this node
	CiliumEndpoints statedb.RWTable[CiliumEndpoint] // k8s: pods of all nodes

	NodeHealth  statedb.RWTable[NodeHealth] // health: what probes of nodes have found
	Controllers statedb.RWTable[Controller] // every loop
	BadObjects  statedb.RWTable[BadObject]  // k8s: objects that could not be used

	reports reports
}

// New returns an empty database. Stop ends its background work.
func New() (*Tables, error) {
	db := statedb.New(statedb.WithMetrics(&statedb.NopMetrics{})) // nobody reads them, and each transaction pays for them
	t := &Tables{DB: db}
	err := firstError(
		create(db, &t.NodeObjects, newNodeObjects),
		create(db, &t.Local, newLocal),
		create(db, &t.Nodes, newNodes),
		create(db, &t.IPCache, newIPCache),
		create(db, &t.Routes, newRoutes),
		create(db, &t.Warnings, newWarnings),
		create(db, &t.NonMasquerade, newNonMasquerade),
		create(db, &t.TunnelPaths, newTunnelPaths),
		create(db, &t.Devices, newDevices),
		create(db, &t.Endpoints, newEndpoints),
		create(db, &t.Pods, newPods),
		create(db, &t.Namespaces, newNamespaces),
		create(db, &t.Services, newServices),
		create(db, &t.Slices, newSlices),
		create(db, &t.ServicePorts, newServicePorts),
		create(db, &t.HealthChecks, newHealthChecks),
		create(db, &t.Identities, newIdentities),
		create(db, &t.PodIdentities, newPodIdentities),
		create(db, &t.CiliumEndpoints, newCiliumEndpoints),
		create(db, &t.NodeHealth, newNodeHealth),
		create(db, &t.Controllers, newControllers),
		create(db, &t.BadObjects, newBadObjects),
	)
	if err != nil {
		return nil, err
	}
	return t, db.Start()
}

// Stop ends the database's background work.
func (t *Tables) Stop() error { return t.DB.Stop() }

func create[Row any](db *statedb.DB, dst *statedb.RWTable[Row], newTable func(*statedb.DB) (statedb.RWTable[Row], error)) error {
	tbl, err := newTable(db)
	if err != nil {
		return fmt.Errorf("create a table of %T: %w", *new(Row), err)
	}
	*dst = tbl
	return nil
}

func firstError(errs ...error) error {
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}

// Insert writes rows in one transaction.
func Insert[Row any](db *statedb.DB, tbl statedb.RWTable[Row], rows ...Row) {
	txn := db.WriteTxn(tbl)
	defer txn.Abort()
	for _, r := range rows {
		mustWrite(tbl.Insert(txn, r))
	}
	txn.Commit()
}

// Delete removes rows, found by their keys, in one transaction.
func Delete[Row any](db *statedb.DB, tbl statedb.RWTable[Row], rows ...Row) {
	txn := db.WriteTxn(tbl)
	defer txn.Abort()
	for _, r := range rows {
		mustWrite(tbl.Delete(txn, r))
	}
	txn.Commit()
}

// Put writes a row within txn.
func Put[Row any](txn statedb.WriteTxn, tbl statedb.RWTable[Row], r Row) {
	mustWrite(tbl.Insert(txn, r))
}

// Remove removes a row, found by its key, within txn.
func Remove[Row any](txn statedb.WriteTxn, tbl statedb.RWTable[Row], r Row) {
	mustWrite(tbl.Delete(txn, r))
}

// Replace makes the rows of tbl for which mine holds equal to rows, within txn, and writes only differences.
func Replace[Row any](txn statedb.WriteTxn, tbl statedb.RWTable[Row], rows []Row, equal func(a, b Row) bool, mine func(Row) bool) (changed bool) {
	primary := tbl.PrimaryIndexer()
	keep := make(map[string]struct{}, len(rows))
	for _, r := range rows {
		keep[string(primary.ObjectToKey(r))] = struct{}{}
		if old, _, ok := tbl.Get(txn, primary.QueryFromObject(r)); ok && equal(old, r) {
			continue
		}
		mustWrite(tbl.Insert(txn, r))
		changed = true
	}
	var gone []Row
	for old := range tbl.All(txn) {
		if _, ok := keep[string(primary.ObjectToKey(old))]; !ok && mine(old) {
			gone = append(gone, old)
		}
	}
	for _, old := range gone {
		mustWrite(tbl.Delete(txn, old))
		changed = true
	}
	return changed
}

// All is a Replace filter that owns every row.
func All[Row any](Row) bool { return true }

// Rows is a copy of the table in key order.
func Rows[Row any](txn statedb.ReadTxn, tbl statedb.Table[Row]) []Row {
	return statedb.Collect(tbl.All(txn))
}

// mustWrite panics on an error of a table write, which can only mean that the transaction does not hold the table: a
// mistake in the program that every run of that line shows.
func mustWrite[Row any](_ Row, _ bool, err error) {
	if err != nil {
		panic("state: " + err.Error())
	}
}

func joined[T fmt.Stringer](items []T) string {
	s := make([]string, len(items))
	for i, it := range items {
		s[i] = it.String()
	}
	return strings.Join(s, ",")
}

func addr(a netip.Addr) string {
	if !a.IsValid() {
		return ""
	}
	return a.String()
}

func labels(m map[string]string) string {
	kv := make([]string, 0, len(m))
	for k, v := range m {
		kv = append(kv, k+"="+v)
	}
	slices.Sort(kv)
	return strings.Join(kv, ",")
}

// byString is the index of rows whose key is a string.
func byString[Row any](name string, key func(Row) string) statedb.Index[Row, string] {
	return statedb.Index[Row, string]{
		Name:       name,
		FromObject: func(r Row) index.KeySet { return index.NewKeySet(index.String(key(r))) },
		FromKey:    index.String,
		FromString: index.FromString,
		Unique:     true,
	}
}

// byPrefix is the index of rows whose key is a prefix; rows sort by address.
func byPrefix[Row any](key func(Row) netip.Prefix) statedb.Index[Row, netip.Prefix] {
	return statedb.Index[Row, netip.Prefix]{
		Name:       "prefix",
		FromObject: func(r Row) index.KeySet { return index.NewKeySet(prefixKey(key(r))) },
		FromKey:    prefixKey,
		FromString: func(s string) (index.Key, error) {
			p, err := netip.ParsePrefix(s)
			if err != nil {
				return nil, err
			}
			return prefixKey(p), nil
		},
		Unique: true,
	}
}

// prefixKey differs for 0.0.0.0/0 and ::/0, and for an IPv4 prefix and its IPv4-mapped form.
func prefixKey(p netip.Prefix) index.Key {
	a := p.Addr().As16()
	family := byte(4)
	if p.Addr().Is6() {
		family = 6
	}
	return append(append(index.Key{family}, a[:]...), byte(p.Bits()))
}
