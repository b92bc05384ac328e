// SPDX-License-Identifier: Apache-2.0

package endpoint

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/lash-net/lash/internal/cni"
	"github.com/lash-net/lash/internal/model"
)

// checkpoints is a directory with one file an endpoint, replaced as a whole. It lies on a tmpfs: a node that boots has
// neither pods nor checkpoints.
type checkpoints struct{ dir string }

func newCheckpoints(stateDir string) (checkpoints, error) {
	dir := filepath.Join(stateDir, "endpoints")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return checkpoints{}, fmt.Errorf("checkpoints: %w", err)
	}
	return checkpoints{dir}, nil
}

func (c checkpoints) path(id uint16) string {
	return filepath.Join(c.dir, strconv.Itoa(int(id))+".json")
}

func (c checkpoints) write(ep model.Endpoint) error {
	data, err := json.MarshalIndent(ep, "", "  ")
	if err == nil {
		err = cni.WriteFile(c.path(ep.ID), append(data, '\n'), 0o600)
	}
	if err != nil {
		return fmt.Errorf("checkpoint of endpoint %d: %w", ep.ID, err)
	}
	return nil
}

func (c checkpoints) remove(id uint16) error {
	if err := os.Remove(c.path(id)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("checkpoint of endpoint %d: %w", id, err)
	}
	return nil
}

// read returns all endpoints that can be read; the error names the files that cannot.
func (c checkpoints) read() ([]model.Endpoint, error) {
	entries, err := os.ReadDir(c.dir)
	if err != nil {
		return nil, fmt.Errorf("checkpoints: %w", err)
	}
	var endpoints []model.Endpoint
	var problems []error
	for _, entry := range entries {
		name, ok := strings.CutSuffix(entry.Name(), ".json")
		if !ok || strings.HasPrefix(name, ".") {
			continue
		}
		path := filepath.Join(c.dir, entry.Name())
		ep, err := readCheckpoint(path)
		if err == nil && strconv.Itoa(int(ep.ID)) != name {
			err = fmt.Errorf("endpoint number %d in a file of another", ep.ID)
		}
		if err != nil {
			problems = append(problems, fmt.Errorf("checkpoint %s: %w", path, err))
			continue
		}
		endpoints = append(endpoints, ep)
	}
	return endpoints, errors.Join(problems...)
}

func readCheckpoint(path string) (model.Endpoint, error) {
	var ep model.Endpoint
	data, err := os.ReadFile(path)
	if err != nil {
		return ep, err
	}
	if err := json.Unmarshal(data, &ep); err != nil {
		return ep, err
	}
	switch {
	case ep.ID == 0:
		return ep, errors.New("no endpoint number")
	case ep.ContainerID == "" || ep.ContainerIfName == "":
		return ep, errors.New("no container or no device name")
	case ep.IfName != hostIfName(ep.ContainerID, ep.ContainerIfName):
		return ep, fmt.Errorf("device %q is not the one of container %s", ep.IfName, ep.ContainerID)
	case len(ep.Addrs()) == 0:
		return ep, errors.New("no address")
	}
	return ep, nil
}
