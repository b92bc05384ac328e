// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"sync"

	"github.com/cilium/ebpf"

	"github.com/lash-net/lash/bpf"
)

func (d *Datapath) programDir() string { return filepath.Join(d.cfg.Root, "programs") }

// loading is an object on its way into the kernel.
type loading struct {
	object string
	spec   *ebpf.CollectionSpec
	used   map[string]*ebpf.Map
	dir    string // where its programs are pinned; empty: nowhere
	coll   *ebpf.Collection
	err    error
}

// load puts the objects' programs into d.programs: those that are pinned, if an earlier agent of this node made them of the
// same, else new ones, which it pins. To verify them is most of what an agent's start takes, so CPUs share it; everything
// else is done by the caller's thread, in whose namespaces the pins are. It returns what went wrong, by object.
func (d *Datapath) load(constants *bpf.Constants) map[string]error {
	var all []*loading
	var verified sync.WaitGroup
	for object := range bpf.Programs {
		l := &loading{object: object}
		all = append(all, l)
		found := false
		if found, l.err = d.prepare(l, constants); found || l.err != nil {
			continue
		}
		verified.Go(func() { l.coll, l.err = create(l.object, l.spec, l.used) })
	}
	verified.Wait()
	errs := map[string]error{}
	for _, l := range all {
		if l.err == nil && l.coll != nil {
			l.err = d.keep(l)
		}
		if l.err != nil {
			errs[l.object] = l.err
		}
	}
	return errs
}

// prepare finds an object's maps, and its programs where they are pinned.
func (d *Datapath) prepare(l *loading, constants *bpf.Constants) (found bool, err error) {
	l.spec, l.used, err = specialise(l.object, constants, func(name string, spec *ebpf.MapSpec) (*ebpf.Map, error) {
		if d.maps[name] == nil {
			m, err := d.openMap(name, spec)
			if err != nil {
				return nil, err
			}
			d.maps[name] = m
		}
		return d.maps[name], nil
	})
	if err != nil || d.cfg.Root == "" {
		return false, err
	}
	sum, err := digest(l.object, constants, l.used)
	if err != nil {
		return false, err
	}
	l.dir = filepath.Join(d.programDir(), l.object+"-"+sum)
	d.kept[filepath.Base(l.dir)] = true
	programs, err := pinnedPrograms(l.dir, l.spec)
	maps.Copy(d.programs, programs)
	return programs != nil, err
}

// keep takes an object's new programs, and pins them.
func (d *Datapath) keep(l *loading) error {
	defer l.coll.Close()
	if l.dir != "" {
		if err := pinPrograms(l.dir, l.coll.Programs); err != nil {
			return err
		}
	}
	for name := range l.coll.Programs {
		d.programs[name] = l.coll.DetachProgram(name)
	}
	return nil
}

// digest stands for all that an object's programs are made of: its text, the constants, and the very maps.
func digest(object string, constants *bpf.Constants, used map[string]*ebpf.Map) (string, error) {
	raw, err := bpf.Object(object)
	if err != nil {
		return "", err
	}
	h := sha256.New()
	h.Write(raw)
	fmt.Fprintf(h, "%#v", *constants)
	for _, name := range slices.Sorted(maps.Keys(used)) {
		info, err := used[name].Info()
		if err != nil {
			return "", fmt.Errorf("map %s: %w", name, err)
		}
		id, ok := info.ID()
		if !ok {
			return "", fmt.Errorf("map %s has no id", name)
		}
		fmt.Fprintf(h, " %s %d", name, id)
	}
	return fmt.Sprintf("%x", h.Sum(nil)[:8]), nil
}

// pinnedPrograms are the programs of spec that are pinned in dir; nil, if not all are.
func pinnedPrograms(dir string, spec *ebpf.CollectionSpec) (_ map[string]*ebpf.Program, err error) {
	programs := map[string]*ebpf.Program{}
	for name := range spec.Programs {
		p, err := ebpf.LoadPinnedProgram(filepath.Join(dir, name), nil)
		if err == nil {
			programs[name] = p
			continue
		}
		for _, p := range programs {
			p.Close()
		}
		if errors.Is(err, os.ErrNotExist) {
			return nil, nil
		}
		return nil, fmt.Errorf("program %s, pinned in %s: %w", name, dir, err)
	}
	return programs, nil
}

// pinPrograms pins programs in dir, in place of what an agent that was ended meanwhile has left there.
func pinPrograms(dir string, programs map[string]*ebpf.Program) error {
	if err := errors.Join(os.RemoveAll(dir), os.MkdirAll(dir, 0o755)); err != nil {
		return fmt.Errorf("programs: %w", err)
	}
	for name, p := range programs {
		if err := p.Pin(filepath.Join(dir, name)); err != nil {
			return fmt.Errorf("pin program %s: %w", name, err)
		}
	}
	return nil
}

// unpinOtherPrograms removes the pins of programs that this agent does not use. What is attached stays, until it is replaced.
func (d *Datapath) unpinOtherPrograms() error {
	if d.cfg.Root == "" {
		return nil
	}
	entries, err := os.ReadDir(d.programDir())
	if err != nil {
		return fmt.Errorf("programs: %w", err)
	}
	for _, e := range entries {
		if d.kept[e.Name()] {
			continue
		}
		if err := os.RemoveAll(filepath.Join(d.programDir(), e.Name())); err != nil {
			return fmt.Errorf("programs of another version: %w", err)
		}
	}
	return nil
}

// loadObject loads an object's programs, with these constants and with the maps that pick chooses for Lash's own.
func loadObject(object string, constants *bpf.Constants, pick func(name string, spec *ebpf.MapSpec) (*ebpf.Map, error)) (*ebpf.Collection, error) {
	spec, used, err := specialise(object, constants, pick)
	if err != nil {
		return nil, err
	}
	return create(object, spec, used)
}

// specialise is an object as it is going to be loaded, and the maps that its programs are going to use.
func specialise(object string, constants *bpf.Constants, pick func(name string, spec *ebpf.MapSpec) (*ebpf.Map, error)) (*ebpf.CollectionSpec, map[string]*ebpf.Map, error) {
	spec, err := bpf.Load(object)
	if err != nil {
		return nil, nil, err
	}
	if err := bpf.Specialise(spec, constants); err != nil {
		return nil, nil, fmt.Errorf("object %s: %w", object, err)
	}
	used := map[string]*ebpf.Map{}
	for name, m := range spec.Maps {
		if !isOurs(name) {
			continue
		}
		if used[name], err = pick(name, m); err != nil {
			return nil, nil, err
		}
		m.MaxEntries = used[name].MaxEntries()
	}
	return spec, used, nil
}

func create(object string, spec *ebpf.CollectionSpec, used map[string]*ebpf.Map) (*ebpf.Collection, error) {
	coll, err := ebpf.NewCollectionWithOptions(spec, ebpf.CollectionOptions{MapReplacements: used})
	if err != nil {
		return nil, fmt.Errorf("load object %s: %w", object, err)
	}
	return coll, nil
}

func isOurs(mapName string) bool { return len(mapName) > 5 && mapName[:5] == "lash_" }
