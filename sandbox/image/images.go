// SPDX-License-Identifier: Apache-2.0

package image

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
)

// Names of the sandbox's own images. No registry has them: they are imported into every node.
const (
	Pause   = "sandbox.local/pause:3.10"
	CoreDNS = "sandbox.local/coredns:1.12.4"
	Toolbox = "sandbox.local/toolbox:1"
)

const busybox = "/bin/busybox"

const searchPath = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// hostTools go into the toolbox image with the libraries they load. sh is dash: busybox's own shell
// prefers its applets (an nc without -u) to what PATH finds.
var hostTools = []string{"dash", "bash", "curl", "nc.openbsd", "ip", "ss", "ping", "dig", "nslookup", "host", "getent", "tcpdump", "ethtool", "conntrack", "iptables-save", "nft"}

// recipe of an archive: what it is made of, how, and the images that it holds.
type recipe struct {
	name   string
	inputs []string
	images []Image
	make   func() (*Tree, error)
	layout string // what else tells one archive of the recipe from another
}

// Ensure writes the sandbox's image archives into dir unless they are there; bin finds the built programs.
func Ensure(dir string, bin func(string) string, say func(string, ...any)) (archives []string, err error) {
	tools, err := lookTools(hostTools)
	if err != nil {
		return nil, err
	}
	one := func(tag string, cfg Config) []Image { return []Image{{cfg, []string{tag}}} }
	return ensure(dir, say, []recipe{
		{name: "pause", inputs: []string{bin("pause")}, images: one(Pause, Config{Entrypoint: []string{"/pause"}, User: "65535:65535"}), make: func() (*Tree, error) {
			t := New()
			return t, t.Copy("/pause", bin("pause"), 0o755)
		}},
		{name: "coredns", inputs: []string{bin("coredns")}, images: one(CoreDNS, Config{Entrypoint: []string{"/coredns"}}), make: func() (*Tree, error) {
			t := base()
			return t, t.Copy("/coredns", bin("coredns"), 0o755)
		}},
		{name: "toolbox", inputs: append([]string{bin("toolbox"), busybox}, tools...), images: one(Toolbox, Config{Entrypoint: []string{"/bin/toolbox"}, Cmd: []string{"pause"}, Env: []string{searchPath}}), make: func() (*Tree, error) {
			t, err := shell(tools)
			if err != nil {
				return nil, err
			}
			return t, t.Copy("/bin/toolbox", bin("toolbox"), 0o755)
		}},
	})
}

// ensure makes the archives that are missing; each file name carries a hash of what it is made of.
func ensure(dir string, say func(string, ...any), recipes []recipe) (archives []string, err error) {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	for _, r := range recipes {
		key, err := stamp(r)
		if err != nil {
			return nil, err
		}
		out := filepath.Join(dir, r.name+"-"+key+".tar")
		archives = append(archives, out)
		if _, err := os.Stat(out); err == nil {
			continue
		}
		say("making image %s", r.images[0].Tags[0])
		t, err := r.make()
		if err != nil {
			return nil, fmt.Errorf("image %s: %w", r.name, err)
		}
		if err := writeArchive(out, t, r.images); err != nil {
			return nil, fmt.Errorf("image %s: %w", r.name, err)
		}
		old, _ := filepath.Glob(filepath.Join(dir, r.name+"-*.tar"))
		for _, f := range old {
			if f != out {
				_ = os.Remove(f)
			}
		}
	}
	return archives, nil
}

func writeArchive(out string, t *Tree, images []Image) error {
	f, err := os.CreateTemp(filepath.Dir(out), ".new-*")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	if err := t.Write(f, runtime.GOARCH, images...); err != nil {
		f.Close()
		return err
	}
	if err := f.Close(); err != nil {
		return err
	}
	return os.Rename(f.Name(), out)
}

// stamp identifies inputs by path, size and time, which is enough to notice an upgrade and needs no
// reading of hundreds of megabytes at each start.
func stamp(r recipe) (string, error) {
	h := sha256.New()
	fmt.Fprintln(h, "layout 1")
	if r.layout != "" {
		fmt.Fprintln(h, r.layout)
	}
	for _, f := range r.inputs {
		st, err := os.Stat(f)
		if err != nil {
			return "", err
		}
		fmt.Fprintln(h, f, st.Size(), st.ModTime().UnixNano())
	}
	return hex.EncodeToString(h.Sum(nil))[:12], nil
}

func lookTools(names []string) ([]string, error) {
	var found, missing []string
	for _, n := range names {
		p, err := exec.LookPath(n)
		if err != nil {
			missing = append(missing, n)
			continue
		}
		found = append(found, p)
	}
	if len(missing) > 0 {
		return nil, fmt.Errorf("the test image needs programs that this machine lacks: %s; run `sandbox deps`", strings.Join(missing, " "))
	}
	return found, nil
}

// base has the files that programs expect of any root.
func base() *Tree {
	t := New()
	for _, d := range []string{"/bin", "/etc", "/proc", "/sys", "/dev", "/run", "/root", "/var", "/lib64"} {
		t.Dir(d, 0o755)
	}
	t.Dir("/tmp", os.ModeSticky|0o777)
	t.File("/etc/passwd", []byte("root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/sh\n"), 0o644)
	t.File("/etc/group", []byte("root:x:0:\nnogroup:x:65534:\n"), 0o644)
	t.File("/etc/nsswitch.conf", []byte("hosts: files dns\n"), 0o644)
	return t
}

var lddPath = regexp.MustCompile(`/[^ ]+`)

// shell is a root with busybox and programs of this machine, and the libraries that those load.
func shell(tools []string) (*Tree, error) {
	t := base()
	for _, d := range []string{"/usr/bin", "/usr/sbin", "/usr/local/bin", "/usr/local/sbin", "/sbin"} {
		t.Link(d, "/bin")
	}
	if err := t.Copy("/bin/busybox", busybox, 0o755); err != nil {
		return nil, err
	}
	applets, err := exec.Command(busybox, "--list").Output()
	if err != nil {
		return nil, fmt.Errorf("busybox --list: %w", err)
	}
	for _, a := range strings.Fields(string(applets)) {
		if a != "busybox" && a != "wget" { // the static busybox's wget crashes without name service libraries
			t.Link("/bin/"+a, busybox)
		}
	}
	for _, tool := range tools {
		real, err := filepath.EvalSymlinks(tool)
		if err != nil {
			return nil, err
		}
		name := filepath.Base(tool)
		if err := t.Copy("/bin/"+name, real, 0o755); err != nil {
			return nil, err
		}
		libs, _ := exec.Command("ldd", real).Output() // a static program has none and ldd says so by failing
		for _, lib := range lddPath.FindAllString(string(libs), -1) {
			if st, err := os.Stat(lib); err != nil || !st.Mode().IsRegular() || t.Has(lib) {
				continue
			}
			if err := t.Copy(lib, lib, 0o755); err != nil {
				return nil, err
			}
		}
	}
	t.Link("/bin/sh", "dash")
	t.Link("/bin/nc", "nc.openbsd")
	for _, f := range []string{"/etc/protocols", "/etc/services"} {
		if _, err := os.Stat(f); err == nil {
			if err := t.Copy(f, f, 0o644); err != nil {
				return nil, err
			}
		}
	}
	return t, nil
}
