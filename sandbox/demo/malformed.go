// SPDX-License-Identifier: Apache-2.0

package demo

import (
	"context"
	_ "embed"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
)

//go:embed malformed.yaml
var malformedYAML string

// reports are what an Event on each object of malformed.yaml that is not in order must say.
var reports = map[string]string{
	"Service fast":             `metadata.annotations[service.lash.io/forwarding-mode]: "fast" is none of snat, dsr`,
	"Service ring":             `metadata.annotations[service.cilium.io/lb-algorithm]: "ring" is none of random, maglev`,
	"Service octal":            `spec.externalIPs[0]: "198.51.100.010" is no IP address`,
	"Service group":            `spec.externalIPs[0]: 239.1.1.1 is no address that can be served`,
	"Service one-family":       `spec.externalIPs: 2001:db8:80::90 is not served, the service has no cluster IP of that family`,
	"Service ranges":           `spec.loadBalancerSourceRanges[0]: "010.0.0.0/8" is no CIDR`,
	"Service ranges-annotated": `metadata.annotations[service.beta.kubernetes.io/load-balancer-source-ranges][1]: "192.168.01.0/24" is no CIDR`,
	"Service second":           `ExternalIPs 198.51.100.91:80/TCP is that of service malformed/fine-first`,

	"EndpointSlice misnamed":       `ports[0]: service malformed/fine has no port "web"/TCP, but "http"/TCP`,
	"EndpointSlice wrong-protocol": `ports[0]: service malformed/fine has no port "http"/UDP, but "http"/TCP`,
	"EndpointSlice big-port":       `ports[0].port: 99999 is no port from 1 to 65535`,
	"EndpointSlice no-port":        `ports[0].port: is missing`,
	"EndpointSlice octal":          `endpoints[0].addresses[0]: "10.0.0.010" is no IP address`,
	"EndpointSlice broadcast":      `endpoints[0].addresses[0]: 255.255.255.255 is no address of a pod or a machine`,
	"EndpointSlice group":          `endpoints[0].addresses[0]: ff05::1 is no address of a pod or a machine`,
	"EndpointSlice names":          `addressType: "FQDN" is none of IPv4, IPv6`,
	"EndpointSlice nobodys":        `metadata.labels[kubernetes.io/service-name]: is missing`,
}

// malformed creates objects that cannot be served, or not wholly: each is told of by an Event on it, and what is in order
// is served all the same.
func (s *serviceStory) malformed(ctx context.Context) error {
	yaml := strings.ReplaceAll(malformedYAML, "WEB4", s.web["n2"].addrs["v4"].String())
	var taken []string
	for _, object := range strings.Split(yaml, "\n---\n") {
		if !strings.Contains(object, "name: refused-") {
			taken = append(taken, object)
		}
	}
	if _, err := s.c.KubectlInput(ctx, strings.Join(taken, "\n---\n"), "apply", "-f", "-"); err != nil {
		return err
	}
	for _, object := range strings.Split(yaml, "\n---\n") {
		if slices.Contains(taken, object) {
			continue
		}
		if _, err := s.c.KubectlInput(ctx, object, "apply", "-f", "-"); err == nil {
			return fmt.Errorf("the API server takes what it refused: how is it reported? %s", object)
		}
	}
	if err := until(ctx, patience, func(ctx context.Context) error {
		events, err := s.eventsOn(ctx, "malformed")
		if err != nil {
			return err
		}
		return compareReports(events)
	}); err != nil {
		return err
	}
	fine, err := s.frontendsOf(ctx, "malformed", "fine")
	if err != nil {
		return err
	}
	for i := range 20 { // one of the backends would be nobody
		out, err := s.in(ctx, s.client["n1"], curl(fine.ips["v4"], 80, "/hostname")...)
		if err := expect(out, err, s.web["n2"].name); err != nil {
			return fmt.Errorf("service malformed/fine, connection %d: %w", i+1, err)
		}
	}
	p := s.paths[0]
	l, err := s.startLoad(ctx, p, "demo", "web", 100, "-for", "1s", "-new", "100")
	if err != nil {
		return err
	}
	r, err := endLoad(l, false)
	if err != nil {
		return err
	}
	return r.verdict(&s.diary)
}

// compareReports says which object lacks its Event, and which has one that it should not have.
func compareReports(events map[string][]string) error {
	var errs []error
	for _, object := range slices.Sorted(maps.Keys(reports)) {
		if !slices.ContainsFunc(events[object], func(text string) bool { return strings.HasPrefix(text, reports[object]) }) {
			errs = append(errs, fmt.Errorf("%s: events are %q, want %q", object, events[object], reports[object]))
		}
	}
	for _, object := range slices.Sorted(maps.Keys(events)) {
		if _, ok := reports[object]; !ok {
			errs = append(errs, fmt.Errorf("%s: events are %q, want none", object, events[object]))
		}
	}
	return errors.Join(errs...)
}
