// SPDX-License-Identifier: Apache-2.0

// Package model holds the plain values that Lash's tables are made of: identities, endpoints, nodes, services, devices,
// routes. It owns their names and their text and JSON forms, reads nothing, writes nothing, and imports only the
// standard library, so that every other package may import it.
package model
