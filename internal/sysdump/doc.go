// SPDX-License-Identifier: Apache-2.0

// Package sysdump collects in one archive what a person needs to find out, without access to the cluster, why it does not
// work: of each node what its agent and its kernel have, of the cluster the objects Lash acts on, and logs.
//
// What cannot be collected is named in the archive's errors.txt and does not stop the rest. Secrets are never asked for,
// and whatever goes into an archive goes through [redact] first. Nothing is written to the cluster.
package sysdump
