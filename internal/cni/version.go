// SPDX-License-Identifier: Apache-2.0

package cni

import (
	"slices"
	"strings"
)

// SupportedVersions are the versions of the CNI specification a network configuration may name, oldest first.
var SupportedVersions = []string{"0.3.1", "0.4.0", "1.0.0", "1.1.0"}

// LatestVersion is the newest of SupportedVersions.
const LatestVersion = "1.1.0"

// since holds the version that introduced a command, for those which not every supported version has.
var since = map[string]string{"CHECK": "0.4.0", "STATUS": "1.1.0", "GC": "1.1.0"}

// versionBefore reports whether supported version a is older than supported version b.
func versionBefore(a, b string) bool {
	return slices.Index(SupportedVersions, a) < slices.Index(SupportedVersions, b)
}

func checkVersion(version string) *Error {
	if version == "" {
		return Errorf(CodeInvalidConfig, "cniVersion is missing").
			With("write one of %s into the network configuration", strings.Join(SupportedVersions, ", "))
	}
	if !slices.Contains(SupportedVersions, version) {
		return Errorf(CodeIncompatibleVersion, "cniVersion %q is not supported", clip(version)).
			With("write one of %s into the network configuration", strings.Join(SupportedVersions, ", "))
	}
	return nil
}
