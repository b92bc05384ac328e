// SPDX-License-Identifier: Apache-2.0

package bench

// Reference figures, to stand beside what is measured here: ratios to the same
// baselines on two-core machines with kernel 6.18. Limits are those of programs
// that only redirect. Cilium is 1.19.4 with BPF host routing; its connect rates
// are as installed, with an event for each connection.
type reference struct {
	limit  float64 // 0: none measured
	cilium float64
}

var references = map[string]map[string]reference{
	SameNode: {
		RR: {1.03, 1 / .88}, CRR: {.98, .30}, Stream: {.99, .97}, StreamX: {1.01, .99},
	},
	AcrossNode: {
		RR: {1.12, 1 / .67}, CRR: {.88, .18}, Stream: {.94, .80}, StreamX: {.94, .81},
	},
	Overlay: {
		RR: {1.45, 1 / .40}, CRR: {1 / 1.53, .14}, Stream: {0, .52}, StreamX: {.74, .39},
	},
	Legacy: {
		RR: {0, 1 / .44}, CRR: {0, .15}, Stream: {0, .62}, StreamX: {0, .53},
	},
	NodePort: {
		RR: {0, 1 / .62},
	},
	HostToHost: {
		RR: {1, 1 / .61}, CRR: {1, .28}, Stream: {1, .78}, StreamX: {1, .73},
	},
}

// gates are the ratios that Lash must keep, for IPv4. IPv6 must be within
// familyGate of it. Latency is bounded above, rates are bounded below.
var gates = map[string]map[string]float64{
	SameNode:   {RR: 1.10, CRR: .86, Stream: .92},
	AcrossNode: {RR: 1.18, CRR: .76, Stream: .88},
	Overlay:    {RR: 1.50, CRR: .58, Stream: .70, StreamX: .54},
	HostToHost: {RR: 1.05, CRR: 1 / 1.05, Stream: 1 / 1.05},
	Events:     {CRR: .95},
	WithinPod:  {RR: .85, Stream: .60},
	Services:   {RR: 1.03, CRR: 1 / 1.05},
	Many:       {RR: 1.03, CRR: 1 / 1.03},
	PerPacket:  {RR: 1.08, CRR: 1 / 1.12},
	NodePort:   {RR: 1 / .80, Flood: .70},
}

const familyGate = .03

// lessIsMore says whether a smaller figure is the better one.
func lessIsMore(kind string) bool { return kind == RR }

// within says whether a ratio keeps a gate.
func within(kind string, ratio, gate float64) bool {
	if lessIsMore(kind) {
		return ratio <= gate
	}
	return ratio >= gate
}
