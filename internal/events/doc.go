// SPDX-License-Identifier: Apache-2.0

// Package events is the one reader of the programs' ring: it hands what they tell to every listener, over bounded
// queues, and counts what the ring or a listener had no room for. While nobody listens the programs tell nothing.
// It reads the ring and the programs' counter of losses; it writes nothing but its listeners' queues. A slow listener
// costs itself events, never the others, and never a packet its time.
package events
