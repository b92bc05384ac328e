// SPDX-License-Identifier: Apache-2.0

package config

import (
	"errors"
	"flag"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// Error is one thing wrong with the configuration. Its text names key, value, source, problem and remedy.
type Error struct {
	Key, Value string
	Source     Source
	Problem    string // what is wrong and what to write instead
}

func (e *Error) Error() string {
	if e.Source.Kind == "" {
		return fmt.Sprintf("%s: %s", e.Key, e.Problem)
	}
	return fmt.Sprintf("%s=%q (%s): %s", e.Key, e.Value, e.Source, e.Problem)
}

// Load reads the directory dir (one file a key, as a mounted ConfigMap is; none if dir is empty), then args (--key=value,
// --key value, --flag for true), and returns the checked result. --config-dir=DIR in args replaces dir. All errors are
// reported, joined; flag.ErrHelp if args ask for help, to be answered with Usage.
func Load(dir string, args []string) (*Config, error) {
	flags, dir, err := parseArgs(args, dir)
	if err != nil {
		return nil, err
	}
	var settings []setting
	if dir != "" {
		if settings, err = readDir(dir); err != nil {
			return nil, err
		}
	}
	return build(append(settings, flags...))
}

// FromMap checks the data of a ConfigMap before it is applied; name is how errors call it.
func FromMap(name string, data map[string]string) (*Config, error) {
	var settings []setting
	for _, key := range slices.Sorted(maps.Keys(data)) {
		settings = append(settings, setting{key, data[key], Source{"file", name}})
	}
	return build(settings)
}

// Usage returns the help text of a program that takes its configuration by Load.
func Usage(program string) string {
	var b strings.Builder
	fmt.Fprintf(&b, "Usage: %s [--config-dir=DIR] [--KEY=VALUE ...]\n\n", program)
	fmt.Fprintf(&b, "DIR holds one file a key, as a mounted ConfigMap does. Flags win over files.\n")
	section := ""
	for _, o := range options() {
		if o.Section != section {
			section = o.Section
			fmt.Fprintf(&b, "\n%s\n", section)
		}
		fmt.Fprintf(&b, "  --%s=%s\n        %s\n", o.Key, o.Default, o.Doc)
	}
	return b.String()
}

// setting is a value somebody gave to a key, before it is understood.
type setting struct {
	key, value string
	source     Source
}

func readDir(dir string) ([]setting, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, fmt.Errorf("read configuration directory: %w", err)
	}
	var settings []setting
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), ".") {
			continue // ..data and the like, by which the kubelet swaps a ConfigMap's files at once
		}
		path := filepath.Join(dir, e.Name())
		if info, err := os.Stat(path); err != nil || info.IsDir() {
			continue
		}
		b, err := os.ReadFile(path)
		if err != nil {
			return nil, fmt.Errorf("read configuration: %w", err)
		}
		settings = append(settings, setting{e.Name(), strings.TrimSpace(string(b)), Source{"file", path}})
	}
	return settings, nil
}

func parseArgs(args []string, dir string) ([]setting, string, error) {
	var settings []setting
	for i := 0; i < len(args); i++ {
		arg := args[i]
		if arg == "-h" || arg == "-help" || arg == "--help" {
			return nil, "", flag.ErrHelp
		}
		name, ok := strings.CutPrefix(arg, "--")
		if !ok || name == "" {
			return nil, "", fmt.Errorf("argument %q: must be a flag of the form --key=value", arg)
		}
		key, value, hasValue := strings.Cut(name, "=")
		if !hasValue {
			o, known := lookup(key)
			switch {
			case known && o.isBool() && (i+1 == len(args) || strings.HasPrefix(args[i+1], "--")):
				value = "true"
			case i+1 < len(args) && !strings.HasPrefix(args[i+1], "--"):
				i++
				value = args[i]
			default:
				return nil, "", fmt.Errorf("flag --%s: needs a value: write --%s=VALUE", key, key)
			}
		}
		if key == "config-dir" {
			dir = value
			continue
		}
		settings = append(settings, setting{key, value, Source{"flag", "--" + key}})
	}
	return settings, dir, nil
}

// build applies the settings in order, a later one of the same key winning, and checks the whole.
func build(settings []setting) (*Config, error) {
	c := Default()
	var errs []error
	given := map[string]setting{} // the setting that decided a key, for conflicts between an old and a new spelling
	for _, orig := range settings {
		present, notes, err := translate(orig)
		c.notes = append(c.notes, notes...)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		for _, s := range present {
			o, ok := lookup(s.key)
			if !ok {
				errs = append(errs, &Error{orig.key, orig.value, orig.source, unknownKey(orig.key)})
				continue
			}
			if prev, ok := given[s.key]; ok && prev.source.Kind == s.source.Kind && prev.key != orig.key && prev.value != s.value {
				errs = append(errs, &Error{orig.key, orig.value, orig.source, fmt.Sprintf(
					"is the old spelling of %s, which is also set, to another value: remove one of the two", s.key)})
				continue
			}
			given[s.key] = setting{orig.key, s.value, s.source}
			if err := o.set(c, s.value); err != nil {
				errs = append(errs, &Error{orig.key, orig.value, orig.source, err.Error()})
				continue
			}
			c.sources[s.key] = s.source
		}
	}
	if len(errs) == 0 {
		errs = c.check()
	}
	if len(errs) > 0 {
		return nil, errors.Join(errs...)
	}
	return c, nil
}

func unknownKey(key string) string {
	var known []string
	for _, o := range options() {
		known = append(known, o.Key)
	}
	known = append(known, slices.Sorted(maps.Keys(renamed))...)
	known = append(known, slices.Sorted(maps.Keys(absent))...)
	known = append(known, "tunnel")
	if near := Nearest(key, known); near != "" {
		return fmt.Sprintf("unknown key: did you mean %s?", near)
	}
	return "unknown key: remove it, or see docs/reference/configuration.md for the keys there are"
}
