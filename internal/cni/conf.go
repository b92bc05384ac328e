// SPDX-License-Identifier: Apache-2.0

package cni

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

const (
	// ConfName sorts before what other plugins usually choose: runtimes take the first file.
	ConfName = "05-lash.conflist"
	// PluginName is the name of the binary and the type in the configuration.
	PluginName = "lash-cni"
	// disabledSuffix is appended to the configurations of others, as cni-exclusive wants it.
	disabledSuffix = ".lash_bak"
)

// Installation is where a container runtime looks for configurations and plugins, as the agent sees these directories.
type Installation struct {
	ConfDir string // usually /etc/cni/net.d
	BinDir  string // usually /opt/cni/bin
	Binary  string // the plugin to install, in the agent's image
	// Exclusive renames the configurations of others, so that no pod starts with them when ours goes away for a while.
	Exclusive bool
	Socket    string // written to the configuration unless it is DefaultSocket
	MTU       int    // of pods' devices, written to the configuration if not 0
	RouteMTU  int
}

// InstallBinary puts the plugin in place. The runtime may execute it at any time, so it is replaced by renaming.
func (i Installation) InstallBinary() error {
	src, err := os.Open(i.Binary)
	if err != nil {
		return fmt.Errorf("install %s: %w", PluginName, err)
	}
	defer src.Close()
	data, err := io.ReadAll(src)
	if err != nil {
		return fmt.Errorf("install %s: read %s: %w", PluginName, i.Binary, err)
	}
	target := filepath.Join(i.BinDir, PluginName)
	if current, err := os.ReadFile(target); err == nil && bytes.Equal(current, data) {
		return os.Chmod(target, 0o755)
	}
	if err := os.MkdirAll(i.BinDir, 0o755); err != nil {
		return fmt.Errorf("install %s: %w", PluginName, err)
	}
	if err := WriteFile(target, data, 0o755); err != nil {
		return fmt.Errorf("install %s: %w", PluginName, err)
	}
	return nil
}

// WriteConf makes the runtime use the plugin. To be called once the agent can serve an ADD: with this file kubelet
// reports the node ready. A second call changes nothing.
func (i Installation) WriteConf() error {
	if err := os.MkdirAll(i.ConfDir, 0o755); err != nil {
		return fmt.Errorf("write %s: %w", ConfName, err)
	}
	path := filepath.Join(i.ConfDir, ConfName)
	data := i.conf()
	current, err := os.ReadFile(path)
	if err != nil || !bytes.Equal(current, data) {
		if err := WriteFile(path, data, 0o644); err != nil {
			return fmt.Errorf("write %s: %w", ConfName, err)
		}
	}
	if !i.Exclusive {
		return nil
	}
	return i.disableOthers()
}

// conf is the configuration list. cniVersion is 1.0.0, which every runtime in use reads; those that know cniVersions
// (libcni 1.2 and later) take the highest of it and so get STATUS and GC.
func (i Installation) conf() []byte {
	plugin := struct {
		Type     string `json:"type"`
		MTU      int    `json:"mtu,omitempty"`
		RouteMTU int    `json:"route-mtu,omitempty"`
		Socket   string `json:"socket,omitempty"`
	}{Type: PluginName, MTU: i.MTU, RouteMTU: i.RouteMTU}
	if i.Socket != DefaultSocket {
		plugin.Socket = i.Socket
	}
	data, _ := json.MarshalIndent(struct { // strings and numbers only: cannot fail
		CNIVersion  string   `json:"cniVersion"`
		CNIVersions []string `json:"cniVersions"`
		Name        string   `json:"name"`
		Plugins     []any    `json:"plugins"`
	}{"1.0.0", SupportedVersions, "lash", []any{plugin}}, "", "  ")
	return append(data, '\n')
}

func (i Installation) disableOthers() error {
	entries, err := os.ReadDir(i.ConfDir)
	if err != nil {
		return fmt.Errorf("disable other configurations: %w", err)
	}
	var problems []error
	for _, entry := range entries {
		name := entry.Name()
		if name == ConfName || entry.IsDir() || !isConf(name) {
			continue
		}
		path := filepath.Join(i.ConfDir, name)
		if err := os.Rename(path, path+disabledSuffix); err != nil {
			problems = append(problems, fmt.Errorf("disable other configurations: %w", err))
		}
	}
	return errors.Join(problems...)
}

// isConf tells which files runtimes take as configurations.
func isConf(name string) bool {
	switch filepath.Ext(name) {
	case ".conf", ".conflist", ".json":
		return !strings.HasPrefix(name, ".")
	}
	return false
}

// RemoveConf takes the configuration away and gives the others back their names. New pods then get another network, or none.
func (i Installation) RemoveConf() error {
	var problems []error
	if err := remove(filepath.Join(i.ConfDir, ConfName)); err != nil {
		problems = append(problems, err)
	}
	entries, err := os.ReadDir(i.ConfDir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		problems = append(problems, err)
	}
	for _, entry := range entries {
		original, ours := strings.CutSuffix(entry.Name(), disabledSuffix)
		if !ours {
			continue
		}
		// Link and remove instead of rename: a new configuration of that name is not to be overwritten.
		from, to := filepath.Join(i.ConfDir, entry.Name()), filepath.Join(i.ConfDir, original)
		if err := os.Link(from, to); err != nil && !errors.Is(err, fs.ErrExist) {
			problems = append(problems, err)
			continue
		}
		if err := remove(from); err != nil {
			problems = append(problems, err)
		}
	}
	return errors.Join(problems...)
}

// Uninstall removes the configuration and the plugin.
func (i Installation) Uninstall() error {
	return errors.Join(i.RemoveConf(), remove(filepath.Join(i.BinDir, PluginName)))
}

func remove(path string) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}
