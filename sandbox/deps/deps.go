// SPDX-License-Identifier: Apache-2.0

// Package deps knows which programs of the distribution a sandbox needs and installs their packages.
package deps

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"sort"
	"strings"
)

// Need maps a program (a name in PATH, or a path) to the Debian package that has it.
type Need map[string]string

// Conformance is what the images of the e2e suite have besides.
var Conformance = Need{
	"wget":  "wget",
	"iperf": "iperf",
}

// Cluster is what every sandbox needs.
var Cluster = Need{
	"containerd":                         "containerd",
	"ctr":                                "containerd",
	"runc":                               "runc",
	"/usr/lib/cni/bridge":                "containernetworking-plugins",
	"/usr/lib/cni/loopback":              "containernetworking-plugins",
	"ip":                                 "iproute2",
	"ss":                                 "iproute2",
	"iptables":                           "iptables",
	"iptables-save":                      "iptables",
	"nft":                                "nftables",
	"conntrack":                          "conntrack",
	"ethtool":                            "ethtool",
	"mount":                              "mount",
	"dash":                               "dash",
	"bash":                               "bash",
	"curl":                               "curl",
	"nc.openbsd":                         "netcat-openbsd",
	"ping":                               "iputils-ping",
	"dig":                                "bind9-dnsutils",
	"nslookup":                           "bind9-dnsutils",
	"host":                               "bind9-host",
	"getent":                             "libc-bin",
	"tcpdump":                            "tcpdump",
	"/bin/busybox":                       "busybox-static",
	"/etc/ssl/certs/ca-certificates.crt": "ca-certificates",
}

// Missing lists the packages whose programs this machine lacks.
func (need Need) Missing() []string {
	set := map[string]bool{}
	for prog, pkg := range need {
		var err error
		if strings.HasPrefix(prog, "/") {
			_, err = os.Stat(prog)
		} else {
			_, err = exec.LookPath(prog)
		}
		if err != nil {
			set[pkg] = true
		}
	}
	list := make([]string, 0, len(set))
	for p := range set {
		list = append(list, p)
	}
	sort.Strings(list)
	return list
}

// Ensure installs what is missing with apt-get. The services of the packages are not started.
func (need Need) Ensure(ctx context.Context, say func(string, ...any)) error {
	missing := need.Missing()
	if len(missing) == 0 {
		return nil
	}
	if _, err := exec.LookPath("apt-get"); err != nil {
		return fmt.Errorf("this machine lacks programs and has no apt-get; install by hand what these Debian packages hold: %s", strings.Join(missing, " "))
	}
	say("installing Debian packages: %s", strings.Join(missing, " "))
	if err := apt(ctx, append([]string{"install", "-y", "-q", "--no-install-recommends"}, missing...)...); err != nil {
		say("refreshing the package lists (apt-get update)")
		if err := apt(ctx, "update", "-q"); err != nil {
			return err
		}
		if err := apt(ctx, append([]string{"install", "-y", "-q", "--no-install-recommends"}, missing...)...); err != nil {
			return err
		}
	}
	if left := need.Missing(); len(left) > 0 {
		return fmt.Errorf("packages %s are installed, but their programs are not in PATH (%s)", strings.Join(left, " "), os.Getenv("PATH"))
	}
	return nil
}

func apt(ctx context.Context, args ...string) error {
	cmd := exec.CommandContext(ctx, "apt-get", append([]string{"-o", "DPkg::Lock::Timeout=300"}, args...)...)
	// RUNLEVEL=1 keeps maintainer scripts from starting services: a sandbox runs its own containerd
	cmd.Env = append(os.Environ(), "DEBIAN_FRONTEND=noninteractive", "RUNLEVEL=1")
	out, err := cmd.CombinedOutput()
	if err != nil {
		lines := strings.Split(strings.TrimSpace(string(out)), "\n")
		return fmt.Errorf("apt-get %s: %w\n%s\nRemedy: make apt-get work on this machine, then run this again", args[0], err, strings.Join(lines[max(0, len(lines)-8):], "\n"))
	}
	return nil
}
