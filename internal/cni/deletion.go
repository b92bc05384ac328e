// SPDX-License-Identifier: Apache-2.0

package cni

import (
	"encoding/json"
	"errors"
	"fmt"
	"hash/fnv"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

// DefaultDeletions is the queue of deletions.
const DefaultDeletions = "/var/run/lash/deletions"

// Deletion is a DEL that came while no agent ran: pods can be deleted then, and the agent catches up when it starts.
//
// No deletion is lost between an agent that starts and a plugin that gives up on it: the plugin writes the file and then
// tries the socket once more, the agent opens the socket and then reads the directory.
type Deletion struct {
	ContainerID string `json:"containerID"`
	IfName      string `json:"ifname"`
}

func (d Deletion) file() string {
	h := fnv.New128a()
	h.Write([]byte(d.ContainerID + "/" + d.IfName))
	return fmt.Sprintf("%x.json", h.Sum(nil))
}

// Queue writes the deletion into dir. A second call with the same deletion changes nothing.
func (d Deletion) Queue(dir string) error {
	data, err := json.Marshal(d)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	return WriteFile(filepath.Join(dir, d.file()), append(data, '\n'), 0o600)
}

// Done takes the deletion off the queue; that it is not there is no error.
func (d Deletion) Done(dir string) error {
	err := os.Remove(filepath.Join(dir, d.file()))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// QueuedDeletions returns what is in dir. Files that cannot be understood are named in the error and do not keep the
// others from being returned.
func QueuedDeletions(dir string) ([]Deletion, error) {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var queued []Deletion
	var problems []error
	for _, entry := range entries {
		if !strings.HasSuffix(entry.Name(), ".json") || strings.HasPrefix(entry.Name(), ".") {
			continue
		}
		path := filepath.Join(dir, entry.Name())
		data, err := os.ReadFile(path)
		if err != nil {
			problems = append(problems, err)
			continue
		}
		var d Deletion
		if err := json.Unmarshal(data, &d); err != nil {
			problems = append(problems, fmt.Errorf("deletion %s: %s; remove the file", path, jsonProblem(data, err)))
			continue
		}
		if e := checkName(CodeDecode, "containerID", d.ContainerID); e != nil {
			problems = append(problems, fmt.Errorf("deletion %s: %w", path, e))
			continue
		}
		queued = append(queued, d)
	}
	return queued, errors.Join(problems...)
}

// WriteFile replaces the file at path as one step: readers see the old content or the new. The temporary name begins
// with a dot, which directory scans of CNI runtimes and of this package skip.
func WriteFile(path string, data []byte, mode os.FileMode) error {
	dir, name := filepath.Split(path)
	tmp, err := os.CreateTemp(dir, "."+name+".*")
	if err != nil {
		return err
	}
	defer os.Remove(tmp.Name()) // fails harmlessly once renamed
	if _, err := tmp.Write(data); err != nil {
		tmp.Close()
		return err
	}
	if err := tmp.Chmod(mode); err != nil {
		tmp.Close()
		return err
	}
	if err := tmp.Close(); err != nil {
		return err
	}
	return os.Rename(tmp.Name(), path)
}
