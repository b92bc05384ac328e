// SPDX-License-Identifier: Apache-2.0

package cni

import (
	"strings"
	"unicode"
	"unicode/utf8"
)

const (
	maxName   = 253 // longest Kubernetes name (RFC 1123 subdomain); container ids are 64 characters
	maxIfName = 15  // IFNAMSIZ - 1
	maxPath   = 4095
	maxMTU    = 65535
	minMTU    = 68 // RFC 791; with IPv6 1280 (RFC 8200), which the agent checks, knowing the families
)

// clip keeps what an error quotes short, whatever was sent.
func clip(s string) string {
	if len(s) <= 64 {
		return s
	}
	cut := 64
	for cut > 0 && !utf8.RuneStart(s[cut]) {
		cut--
	}
	return s[:cut] + "..."
}

// checkName applies the character set that the CNI specification gives for container ids and network names: a letter
// or digit, then letters, digits, '.', '_' and '-'.
func checkName(code int, field, value string) *Error {
	remedy := "use a letter or digit first, then letters, digits, '.', '_' or '-', at most 253 in all"
	if value == "" {
		return Errorf(code, "%s is missing", field).With("%s", remedy)
	}
	if len(value) > maxName {
		return Errorf(code, "%s %q is %d characters long", field, clip(value), len(value)).With("%s", remedy)
	}
	for i := range len(value) {
		c := value[i]
		alnum := c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9'
		if !alnum && (i == 0 || c != '.' && c != '_' && c != '-') {
			return Errorf(code, "%s %q has the character %q at position %d", field, clip(value), c, i+1).With("%s", remedy)
		}
	}
	return nil
}

// checkIfName applies the kernel's rules for device names (dev_valid_name), and keeps lo out.
func checkIfName(code int, field, value string) *Error {
	remedy := "use 1 to 15 characters without '/', ':' and white space, as the kernel wants them; usually eth0"
	switch {
	case value == "":
		return Errorf(code, "%s is missing", field).With("%s", remedy)
	case len(value) > maxIfName:
		return Errorf(code, "%s %q is %d characters long", field, clip(value), len(value)).With("%s", remedy)
	case value == "." || value == "..":
		return Errorf(code, "%s %q is no device name", field, value).With("%s", remedy)
	case value == "lo":
		return Errorf(code, "%s is lo, the loopback device every pod has already", field).With("%s", remedy)
	}
	for i, r := range value {
		if r == '/' || r == ':' || r == utf8.RuneError || unicode.IsSpace(r) || !unicode.IsPrint(r) {
			return Errorf(code, "%s %q has the character %q at position %d", field, value, r, i+1).With("%s", remedy)
		}
	}
	return nil
}

func checkPath(code int, field, value string) *Error {
	remedy := "give the absolute path of the pod's network namespace, such as /var/run/netns/cni-1234"
	switch {
	case value == "":
		return Errorf(code, "%s is missing", field).With("%s", remedy)
	case !strings.HasPrefix(value, "/"):
		return Errorf(code, "%s %q is not an absolute path", field, clip(value)).With("%s", remedy)
	case len(value) > maxPath:
		return Errorf(code, "%s is %d characters long", field, len(value)).With("%s", remedy)
	case strings.IndexByte(value, 0) >= 0:
		return Errorf(code, "%s %q has a zero byte in it", field, clip(value)).With("%s", remedy)
	}
	return nil
}

func checkMTU(code int, field string, value int) *Error {
	if value != 0 && (value < minMTU || value > maxMTU) {
		return Errorf(code, "%s %d is out of range", field, value).With("use %d to %d, or leave it out to let the agent choose", minMTU, maxMTU)
	}
	return nil
}
