// SPDX-License-Identifier: Apache-2.0

package config

import (
	"fmt"
	"net/netip"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
)

// Option describes one key.
type Option struct {
	Key, Default, Doc, Section string
	OneOf                      []string
	index                      int
}

// Options returns every key in the order of the struct, which is the order of the reference.
func Options() []Option { return slices.Clone(options()) }

var options = sync.OnceValue(func() []Option {
	var opts []Option
	t := reflect.TypeFor[Config]()
	for i := range t.NumField() {
		f := t.Field(i)
		key, ok := f.Tag.Lookup("key")
		if !ok {
			continue
		}
		o := Option{Key: key, Default: f.Tag.Get("default"), Doc: f.Tag.Get("doc"), Section: f.Tag.Get("section"), index: i}
		if s := f.Tag.Get("one-of"); s != "" {
			o.OneOf = strings.Split(s, ",")
		}
		opts = append(opts, o)
	}
	return opts
})

var optionsByKey = sync.OnceValue(func() []Option {
	opts := Options()
	slices.SortFunc(opts, func(a, b Option) int { return strings.Compare(a.Key, b.Key) })
	return opts
})

func lookup(key string) (Option, bool) {
	i, ok := slices.BinarySearchFunc(optionsByKey(), key, func(o Option, k string) int { return strings.Compare(o.Key, k) })
	if !ok {
		return Option{}, false
	}
	return optionsByKey()[i], true
}

// Type names the kind of value the key takes, for the reference.
func (o Option) Type() string {
	switch o.field(&Config{}).Interface().(type) {
	case bool:
		return "true or false"
	case int:
		return "number"
	case time.Duration:
		return "duration"
	case netip.Prefix:
		return "CIDR"
	case []netip.Prefix:
		return "CIDRs"
	case []string:
		return "list"
	case PortRange:
		return "port range"
	}
	if len(o.OneOf) > 0 {
		return strings.Join(o.OneOf, ", ")
	}
	return "text"
}

func (o Option) isBool() bool {
	_, ok := o.field(&Config{}).Interface().(bool)
	return ok
}

func (o Option) field(c *Config) reflect.Value { return reflect.ValueOf(c).Elem().Field(o.index) }

// set parses s into the field. An error is the remedy: what a right value looks like.
func (o Option) set(c *Config, s string) error {
	s = strings.TrimSpace(s)
	if len(o.OneOf) > 0 && !slices.Contains(o.OneOf, s) {
		return fmt.Errorf("must be %s", anyOf(o.OneOf))
	}
	switch p := o.field(c).Addr().Interface().(type) {
	case *bool:
		if s != "true" && s != "false" {
			return fmt.Errorf("must be true or false")
		}
		*p = s == "true"
	case *int:
		n, err := strconv.Atoi(s)
		if err != nil {
			return fmt.Errorf("must be a whole number, like %s", o.Default)
		}
		*p = n
	case *time.Duration:
		d, err := time.ParseDuration(s)
		if err != nil || d < 0 {
			return fmt.Errorf("must be a duration with its unit, like %s", o.Default)
		}
		*p = d
	case *string:
		*p = s
	case *[]string:
		*p = splitList(s)
	case *netip.Prefix:
		if s == "" {
			*p = netip.Prefix{}
			return nil
		}
		cidr, err := parseCIDR(s)
		if err != nil {
			return err
		}
		*p = cidr
	case *[]netip.Prefix:
		var cidrs []netip.Prefix
		for _, item := range splitList(s) {
			cidr, err := parseCIDR(item)
			if err != nil {
				return err
			}
			cidrs = append(cidrs, cidr)
		}
		*p = cidrs
	case *PortRange:
		first, last, ok := strings.Cut(strings.Replace(s, ",", "-", 1), "-") // old charts write 30000,32767
		a, err1 := strconv.ParseUint(strings.TrimSpace(first), 10, 16)
		b, err2 := strconv.ParseUint(strings.TrimSpace(last), 10, 16)
		if !ok || err1 != nil || err2 != nil || a == 0 || a > b {
			return fmt.Errorf("must be FIRST-LAST with 1 <= FIRST <= LAST <= 65535, like %s", o.Default)
		}
		*p = PortRange{uint16(a), uint16(b)}
	default:
		panic(fmt.Sprintf("config: no parser for %T", p))
	}
	return nil
}

// get is the inverse of set.
func (o Option) get(c *Config) string {
	switch v := o.field(c).Interface().(type) {
	case []string:
		return strings.Join(v, ",")
	case netip.Prefix:
		if !v.IsValid() {
			return ""
		}
		return v.String()
	case []netip.Prefix:
		items := make([]string, len(v))
		for i, p := range v {
			items[i] = p.String()
		}
		return strings.Join(items, ",")
	case PortRange:
		return fmt.Sprintf("%d-%d", v.First, v.Last)
	default:
		return fmt.Sprint(v)
	}
}

func parseCIDR(s string) (netip.Prefix, error) {
	p, err := netip.ParsePrefix(s)
	if err != nil {
		if a, err := netip.ParseAddr(s); err == nil {
			return netip.Prefix{}, fmt.Errorf("must be a CIDR: write %s/%d for this one address", a, a.BitLen())
		}
		return netip.Prefix{}, fmt.Errorf("must be a CIDR, like 10.0.0.0/8 or fd00::/104")
	}
	if p.Addr().Is4In6() {
		return netip.Prefix{}, fmt.Errorf("must be a plain IPv4 or IPv6 CIDR, not an IPv4-mapped one")
	}
	if p.Masked() != p {
		return netip.Prefix{}, fmt.Errorf("has bits set after its prefix: write %s", p.Masked())
	}
	return p, nil
}

func splitList(s string) []string {
	return strings.FieldsFunc(s, func(r rune) bool {
		return r == ',' || r == ' ' || r == '\t' || r == '\n' || r == '[' || r == ']' || r == '"'
	})
}

func anyOf(values []string) string {
	switch len(values) {
	case 1:
		return values[0]
	case 2:
		return values[0] + " or " + values[1]
	}
	return strings.Join(values[:len(values)-1], ", ") + " or " + values[len(values)-1]
}
