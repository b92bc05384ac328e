// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

// testBinary is a package's compiled tests.
type testBinary struct {
	ImportPath string
	Dir        string // the package's folder, where its tests run
	File       string
}

// compileTests builds the tests of the packages that the patterns name, out
// here where compiling is fast, below dir. Packages without tests are left out.
func compileTests(ctx context.Context, dir string, patterns []string, tags string, say func(string, ...any)) ([]testBinary, error) {
	args := []string{"list", "-json=ImportPath,Dir,TestGoFiles,XTestGoFiles"}
	if tags != "" {
		args = append(args, "-tags", tags)
	}
	cmd := exec.CommandContext(ctx, "go", append(args, patterns...)...)
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("go list %s: %w\n%s", strings.Join(patterns, " "), err, stderr.String())
	}
	packages, err := parsePackages(string(out))
	if err != nil {
		return nil, err
	}
	for i := range packages {
		p := &packages[i]
		p.File = filepath.Join(dir, strings.ReplaceAll(p.ImportPath, "/", "-")+".test")
		say("compiling the tests of %s", p.ImportPath)
		args := []string{"test", "-c", "-o", p.File}
		if tags != "" {
			args = append(args, "-tags", tags)
		}
		cmd := exec.CommandContext(ctx, "go", append(args, p.ImportPath)...)
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := cmd.CombinedOutput(); err != nil {
			return nil, fmt.Errorf("compile the tests of %s: %w\n%s", p.ImportPath, err, out)
		}
	}
	if len(packages) == 0 {
		return nil, fmt.Errorf("no tests in %s", strings.Join(patterns, " "))
	}
	return packages, nil
}

// parsePackages reads the stream of "go list -json", keeping what has tests.
func parsePackages(stream string) ([]testBinary, error) {
	dec := json.NewDecoder(strings.NewReader(stream))
	var packages []testBinary
	for dec.More() {
		var p struct {
			ImportPath, Dir           string
			TestGoFiles, XTestGoFiles []string
		}
		if err := dec.Decode(&p); err != nil {
			return nil, fmt.Errorf("output of go list: %w", err)
		}
		if len(p.TestGoFiles)+len(p.XTestGoFiles) > 0 {
			packages = append(packages, testBinary{ImportPath: p.ImportPath, Dir: p.Dir})
		}
	}
	return packages, nil
}

// testStep runs one compiled package in the guest. The test's own timeout comes
// first, for its goroutine dump; the guest's is the second line.
func testStep(b testBinary, run string, timeout time.Duration, env []string) Step {
	argv := []string{b.File, "-test.v", "-test.short", "-test.timeout=" + timeout.String()}
	if run != "" {
		argv = append(argv, "-test.run="+run)
	}
	return Step{Name: b.ImportPath, Dir: b.Dir, Argv: argv, Env: env, Timeout: timeout + 20*time.Second}
}
