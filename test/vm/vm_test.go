// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"encoding/binary"
	"errors"
	"flag"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

func TestLoadOrderPutsDependenciesFirst(t *testing.T) {
	const dep = `kernel/net/9p/9pnet.ko:
kernel/fs/fuse/fuse.ko:
kernel/fs/fuse/virtiofs.ko: kernel/fs/fuse/fuse.ko
kernel/drivers/virtio/virtio.ko:
kernel/drivers/virtio/virtio_ring.ko: kernel/drivers/virtio/virtio.ko
kernel/drivers/char/virtio-console.ko.xz: kernel/drivers/virtio/virtio_ring.ko kernel/drivers/virtio/virtio.ko
`
	const builtin = "kernel/fs/overlayfs/overlay.ko\n"
	got, err := loadOrder(dep, builtin, []string{"virtio_console", "virtiofs", "overlay"})
	if err != nil {
		t.Fatal(err)
	}
	want := []string{
		"kernel/drivers/virtio/virtio.ko", "kernel/drivers/virtio/virtio_ring.ko",
		"kernel/drivers/char/virtio-console.ko.xz", "kernel/fs/fuse/fuse.ko", "kernel/fs/fuse/virtiofs.ko",
	}
	if !slices.Equal(got, want) {
		t.Errorf("got %q\nwant %q", got, want)
	}
	if _, err := loadOrder(dep, builtin, []string{"btrfs"}); err == nil || !strings.Contains(err.Error(), "btrfs") {
		t.Errorf("an unknown module gives %v, want an error that names it", err)
	}
}

func TestCpioIsReadableByCpio(t *testing.T) {
	cpio, err := exec.LookPath("cpio")
	if err != nil {
		t.Skip("no cpio here to read the archive with")
	}
	var b bytes.Buffer
	c := &cpioWriter{w: &b}
	c.Add("etc", cpioDir, nil)
	c.Add("etc/odd", cpioFile, []byte("five5"))
	c.Add("init", cpioExec, []byte("#!"))
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	cmd := exec.Command(cpio, "-id", "--quiet")
	cmd.Dir, cmd.Stdin = dir, &b
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("cpio: %v\n%s", err, out)
	}
	if got, err := os.ReadFile(filepath.Join(dir, "etc/odd")); err != nil || string(got) != "five5" {
		t.Errorf("etc/odd holds %q, %v", got, err)
	}
	if !executable(filepath.Join(dir, "init")) {
		t.Error("init is not executable")
	}
}

func TestCpioEntriesAreAligned(t *testing.T) {
	for size := range 9 {
		var b bytes.Buffer
		c := &cpioWriter{w: &b}
		c.Add("abc", cpioFile, make([]byte, size))
		at := b.Len()
		c.Add("d", cpioFile, nil)
		if at%4 != 0 || !bytes.HasPrefix(b.Bytes()[at:], []byte("070701")) {
			t.Errorf("after %d bytes the next header starts at %d", size, at)
		}
	}
}

func TestCpioReportsAFullDisk(t *testing.T) {
	c := &cpioWriter{w: failingWriter{}}
	c.Add("x", cpioFile, []byte("y"))
	if err := c.Close(); !errors.Is(err, io.ErrShortWrite) {
		t.Errorf("got %v, want the writer's error", err)
	}
}

type failingWriter struct{}

func (failingWriter) Write([]byte) (int, error) { return 0, io.ErrShortWrite }

// image makes a bzImage whose payload is body and four bytes of size.
func image(body []byte) []byte {
	const sectors, offset = 2, 0x40
	b := make([]byte, (sectors+1)*512+offset)
	b[0x1f1] = sectors
	copy(b[0x202:], "HdrS")
	binary.LittleEndian.PutUint32(b[0x248:], offset)
	binary.LittleEndian.PutUint32(b[0x24c:], uint32(len(body)+4))
	return append(append(b, body...), 1, 2, 3, 4)
}

func TestKernelIsUnpackedFromItsImage(t *testing.T) {
	elf := []byte("\x7fELF and the rest")
	for _, c := range []struct{ name, program string }{{"xz", "xz"}, {"gzip", "gzip"}} {
		t.Run(c.name, func(t *testing.T) {
			cmd := exec.Command(c.program, "-c")
			cmd.Stdin = bytes.NewReader(elf)
			packed, err := cmd.Output()
			if err != nil {
				t.Skipf("no %s here: %v", c.program, err)
			}
			got, err := unpackKernel(image(packed))
			if err != nil || !bytes.Equal(got, elf) {
				t.Errorf("got %q, %v", got, err)
			}
		})
	}
}

func TestOddKernelImagesAreRefused(t *testing.T) {
	long := image(nil)
	binary.LittleEndian.PutUint32(long[0x24c:], 1<<30)
	for name, b := range map[string][]byte{
		"empty": nil, "no header": make([]byte, 4096), "payload too long": long,
		"unknown compression": image([]byte("plainly not packed")), "broken xz": image([]byte{0xfd, '7', 'z', 'X', 'Z', 0, 1, 2}),
	} {
		if got, err := unpackKernel(b); err == nil {
			t.Errorf("%s: got %d bytes, want an error", name, len(got))
		}
	}
}

func TestKernelReleaseIsReadFromApt(t *testing.T) {
	for in, want := range map[string]string{
		"linux-image-cloud-amd64\n  Depends: linux-image-6.1.0-56-cloud-amd64\n":            "6.1.0-56-cloud-amd64",
		"linux-image-6.12-cloud-amd64\n  Depends: linux-image-6.12.117+deb12-cloud-amd64\n": "6.12.117+deb12-cloud-amd64",
		"linux-image-cloud-amd64\n  Depends: <linux-image-none>\n":                          "",
		"linux-image-cloud-amd64\n  Depends: linux-image-../../etc\n":                       "",
		"": "",
	} {
		if got := parseDepends(in); got != want {
			t.Errorf("%q gives %q, want %q", in, got, want)
		}
	}
}

func TestFramesCarryOutputAndEventsInOrder(t *testing.T) {
	var b bytes.Buffer
	w := &frameWriter{w: &b}
	big := bytes.Repeat([]byte("x"), frameMax+10)
	for _, step := range []func() error{
		func() error { return w.Event(Event{Kind: "start", Step: 3}) },
		func() error { _, err := w.Write([]byte("hello")); return err },
		func() error { _, err := w.Write(big); return err },
		func() error { return w.Event(Event{Kind: "end", Step: 3, Status: 2}) },
	} {
		if err := step(); err != nil {
			t.Fatal(err)
		}
	}
	var log []string
	var out bytes.Buffer
	whole := b.Bytes()
	err := readFrames(bytes.NewReader(whole), func(p []byte) { out.Write(p); log = append(log, "out") },
		func(e Event) { log = append(log, e.Kind) })
	if err != nil {
		t.Fatal(err)
	}
	if want := []string{"start", "out", "out", "out", "end"}; !slices.Equal(log, want) {
		t.Errorf("order %q, want %q", log, want)
	}
	if out.String() != "hello"+string(big) {
		t.Errorf("output of %d bytes was changed on its way", out.Len())
	}
	err = readFrames(bytes.NewReader(whole[:len(whole)-1]), func([]byte) {}, func(Event) {})
	if err == nil {
		t.Error("a stream cut within a frame gives no error")
	}
	if err := readFrames(strings.NewReader("Z\x00\x00\x00\x00"), nil, nil); err == nil {
		t.Error("an unknown frame gives no error")
	}
}

func TestOnlyMountsThatHoldAPathAreShared(t *testing.T) {
	const mountinfo = `21 1 8:1 / / rw - ext4 /dev/vda rw
22 21 8:2 / /home rw - ext4 /dev/vdb rw
23 21 0:3 / /proc rw - proc proc rw
24 22 8:3 / /home/a\040b rw - ext4 /dev/vdc rw
`
	points := mountPoints(mountinfo)
	got := sharesFor([]string{"/root/lash", "/home/x", "/home/y/z", "/home/a b/c", "/homestead"}, "/home/x/out", points)
	want := []Share{{"root", "/", false}, {"share1", "/home", false}, {"share2", "/home/a b", false}, {"writable", "/home/x/out", true}}
	if !slices.Equal(got, want) {
		t.Errorf("got %v\nwant %v", got, want)
	}
}

func TestOptionsAreChecked(t *testing.T) {
	o, err := parseOptions([]string{"-kernel", "6.1, 6.12", "-env", "A=b", "-timeout", "5s", "--", "uname", "-r"})
	if err != nil || !slices.Equal(o.kernels, []string{"6.1", "6.12"}) || !slices.Equal(o.command, []string{"uname", "-r"}) ||
		o.timeout != 5*time.Second || !slices.Equal(o.env, []string{"A=b"}) {
		t.Errorf("got %+v, %v", o, err)
	}
	t.Setenv("LASH_VM_TEST", "seen")
	if o, err := parseOptions([]string{"-env", "LASH_VM_TEST"}); err != nil || !slices.Equal(o.env, []string{"LASH_VM_TEST=seen"}) {
		t.Errorf("a bare -env gives %q, %v", o.env, err)
	}
	for _, c := range []struct {
		args []string
		want string
	}{
		{[]string{"-kernel", ","}, "-kernel"},
		{[]string{"-pkg", "./x", "--", "ls"}, "exclude"},
		{[]string{"-timeout", "0s"}, "-timeout"},
		{[]string{"-timeout", "soon"}, "timeout"},
		{[]string{"-cpus", "0"}, "-cpus"},
		{[]string{"-writable", "/nonexistent"}, "-writable"},
		{[]string{"-writable", "/"}, "-writable"},
		{[]string{"-kernle", "6.1"}, "kernle"},
	} {
		if _, err := parseOptions(c.args); err == nil || errors.Is(err, flag.ErrHelp) || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%q gives %v, want an error that names %s", c.args, err, c.want)
		}
	}
}

func TestPackagesWithoutTestsAreLeftOut(t *testing.T) {
	got, err := parsePackages(`{"ImportPath":"m/a","Dir":"/m/a"}
{"ImportPath":"m/b","Dir":"/m/b","TestGoFiles":["b_test.go"]}
{"ImportPath":"m/c","Dir":"/m/c","XTestGoFiles":["c_test.go"]}`)
	if err != nil || len(got) != 2 || got[0].ImportPath != "m/b" || got[1].Dir != "/m/c" {
		t.Errorf("got %v, %v", got, err)
	}
}

func TestAKilledRunIsSweptAndALivingOneIsNot(t *testing.T) {
	t.Setenv("TMPDIR", t.TempDir())
	living, release, err := newRunDir()
	if err != nil {
		t.Fatal(err)
	}
	defer release()
	dead := filepath.Join(os.TempDir(), runPattern+"dead")
	os.Mkdir(dead, 0o700)
	os.WriteFile(filepath.Join(dead, "lock"), nil, 0o600)
	sweepRuns()
	if !exists(living) {
		t.Error("the living run's folder is gone")
	}
	if exists(dead) {
		t.Error("the dead run's folder is still there")
	}
}
