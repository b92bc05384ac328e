// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"path"
	"strings"
)

// bootModules mount the root inside the guest; whatever else a command needs
// is loaded by the kernel's own requests for modules.
var bootModules = []string{"virtio_pci", "virtio_console", "virtiofs", "overlay"}

// moduleName is a module's name as the kernel spells it, from its file name.
func moduleName(file string) string {
	name, _, _ := strings.Cut(path.Base(file), ".ko")
	return strings.ReplaceAll(name, "-", "_")
}

// loadOrder returns the files that loading the named modules needs, each once,
// dependencies first. dep is the text of modules.dep, builtin that of
// modules.builtin; a name found in neither is an error.
func loadOrder(dep, builtin string, names []string) ([]string, error) {
	type module struct {
		file string
		deps []string
	}
	byName := map[string]module{}
	for line := range strings.Lines(dep) {
		file, deps, ok := strings.Cut(strings.TrimSpace(line), ":")
		if ok {
			byName[moduleName(file)] = module{file, strings.Fields(deps)}
		}
	}
	linked := map[string]bool{}
	for line := range strings.Lines(builtin) {
		linked[moduleName(strings.TrimSpace(line))] = true
	}
	var order []string
	seen := map[string]bool{}
	add := func(file string) {
		if !seen[file] {
			seen[file] = true
			order = append(order, file)
		}
	}
	for _, name := range names {
		m, ok := byName[name]
		if !ok {
			if linked[name] {
				continue
			}
			return nil, fmt.Errorf("the kernel package has no module %s", name)
		}
		// depmod lists a module's dependencies nearest first: load them from the end.
		for i := len(m.deps) - 1; i >= 0; i-- {
			add(m.deps[i])
		}
		add(m.file)
	}
	return order, nil
}
