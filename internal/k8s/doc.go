// SPDX-License-Identifier: Apache-2.0

// Package k8s turns API objects into rows and rows into API objects. It owns the connection to the API server, writes
// the tables node-objects, services, endpointslices, pods and bad-objects, and reads none. Objects are converted as they
// arrive and dropped, so that memory holds rows only. While the API server is away rows stay as they are; after a list
// the rows become those of the list in one step.
package k8s
