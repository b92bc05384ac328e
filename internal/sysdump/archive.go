// SPDX-License-Identifier: Apache-2.0

package sysdump

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"path"
	"slices"
	"strings"
	"sync"
	"time"
)

// ErrorsFile is the file that names what could not be collected.
const ErrorsFile = "errors.txt"

// Part is one file of an archive.
type Part struct {
	Name string
	Get  func(ctx context.Context) ([]byte, error)
}

// Problem is a part that could not be collected.
type Problem struct {
	Part string
	Err  error
}

// Archive is written part by part, from several goroutines.
type Archive struct {
	dir string // everything is below it
	now time.Time

	mu       sync.Mutex
	tar      *tar.Writer
	gzip     *gzip.Writer // nil: a plain tar
	files    int
	problems []Problem
	broken   error // nothing can be written any more
}

// NewArchive begins a tar.gz whose files lie in dir.
func NewArchive(w io.Writer, dir string, now time.Time) *Archive {
	z := gzip.NewWriter(w)
	return &Archive{dir: dir, now: now, tar: tar.NewWriter(z), gzip: z}
}

// NewStream begins a plain tar of one node, which Merge reads.
func NewStream(w io.Writer, now time.Time) *Archive { return &Archive{now: now, tar: tar.NewWriter(w)} }

// Add writes a file, without its secrets.
func (a *Archive) Add(name string, data []byte) {
	data = redact(data)
	a.mu.Lock()
	defer a.mu.Unlock()
	a.write(name, data)
}

func (a *Archive) write(name string, data []byte) {
	if a.broken != nil {
		return
	}
	name = path.Join(a.dir, path.Join("/", name)) // nothing is outside of dir
	a.broken = a.tar.WriteHeader(&tar.Header{Name: strings.TrimPrefix(name, "/"), Mode: 0o600, Size: int64(len(data)), ModTime: a.now})
	if a.broken == nil {
		_, a.broken = a.tar.Write(data)
	}
	a.files++
}

// Fail notes that a part could not be collected.
func (a *Archive) Fail(name string, err error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.problems = append(a.problems, Problem{name, errors.New(redactText(err.Error()))})
}

// Collect adds a part that may take no longer than limit.
func (a *Archive) Collect(ctx context.Context, limit time.Duration, p Part) {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	data, err := p.Get(ctx)
	if err != nil {
		a.Fail(p.Name, err)
	}
	if err == nil || len(data) > 0 {
		a.Add(p.Name, data)
	}
}

// Merge adds the files and problems of another node's stream below dir, and returns how many files there were.
func (a *Archive) Merge(dir string, stream io.Reader) (files int, err error) {
	r := tar.NewReader(stream)
	for {
		h, err := r.Next()
		if err == io.EOF {
			return files, nil
		}
		if err != nil {
			return files, fmt.Errorf("answer of the node: %w", err)
		}
		var b bytes.Buffer
		if _, err := io.Copy(&b, r); err != nil {
			return files, fmt.Errorf("answer of the node: %s: %w", h.Name, err)
		}
		if h.Name == ErrorsFile {
			for line := range strings.Lines(b.String()) {
				name, text, _ := strings.Cut(strings.TrimSpace(line), ": ")
				a.Fail(path.Join(dir, name), errors.New(text))
			}
			continue
		}
		a.Add(path.Join(dir, path.Join("/", h.Name)), b.Bytes())
		files++
	}
}

// Close writes what could not be collected and ends the archive.
func (a *Archive) Close() error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if len(a.problems) > 0 {
		var b bytes.Buffer
		for _, p := range a.sorted() {
			fmt.Fprintf(&b, "%s: %s\n", p.Part, strings.ReplaceAll(p.Err.Error(), "\n", "; "))
		}
		a.write(ErrorsFile, b.Bytes())
	}
	errs := []error{a.broken, a.tar.Close()}
	if a.gzip != nil {
		errs = append(errs, a.gzip.Close())
	}
	return errors.Join(errs...)
}

// Problems are the parts that could not be collected, sorted; Files is how many were.
func (a *Archive) Problems() []Problem {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.sorted()
}

func (a *Archive) sorted() []Problem {
	out := slices.Clone(a.problems)
	slices.SortStableFunc(out, func(x, y Problem) int { return strings.Compare(x.Part, y.Part) })
	return out
}

// Files is how many files have been written.
func (a *Archive) Files() int {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.files
}
