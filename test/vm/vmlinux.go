// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"os/exec"
)

// compressors are what kernels are packed with, by the first bytes.
var compressors = []struct {
	magic []byte
	argv  []string
}{
	{[]byte{0xfd, '7', 'z', 'X', 'Z', 0}, []string{"xz", "-dc", "--single-stream"}},
	{[]byte{0x28, 0xb5, 0x2f, 0xfd}, []string{"zstd", "-dc"}},
	{[]byte{0x02, 0x21, 0x4c, 0x18}, []string{"lz4", "-dc"}},
	{[]byte{0x1f, 0x8b, 0x08}, []string{"gzip", "-dc"}},
}

// payload finds the compressed kernel within a bzImage: the x86 boot protocol's
// setup_sects (0x1f1), payload_offset (0x248) and payload_length (0x24c).
func payload(image []byte) ([]byte, error) {
	if len(image) < 0x250 || !bytes.Equal(image[0x202:0x206], []byte("HdrS")) {
		return nil, fmt.Errorf("not a bzImage: no HdrS header at 0x202")
	}
	sectors := int(image[0x1f1])
	if sectors == 0 {
		sectors = 4
	}
	start := (sectors+1)*512 + int(binary.LittleEndian.Uint32(image[0x248:]))
	end := start + int(binary.LittleEndian.Uint32(image[0x24c:]))
	if start >= end || end > len(image) {
		return nil, fmt.Errorf("bzImage payload %d..%d lies outside its %d bytes", start, end, len(image))
	}
	return image[start:end], nil
}

// unpackKernel returns the ELF kernel within a bzImage. qemu enters it by its
// PVH note, which saves the emulated decompression: 2 to 9 s a boot.
func unpackKernel(image []byte) ([]byte, error) {
	packed, err := payload(image)
	if err != nil {
		return nil, err
	}
	for _, c := range compressors {
		if !bytes.HasPrefix(packed, c.magic) {
			continue
		}
		// The last four bytes are the unpacked size, which no format knows.
		cmd := exec.Command(c.argv[0], c.argv[1:]...)
		cmd.Stdin = bytes.NewReader(packed[:len(packed)-4])
		out, err := cmd.Output()
		if bytes.HasPrefix(out, []byte("\x7fELF")) {
			return out, nil
		}
		return nil, fmt.Errorf("unpack kernel with %s: no ELF file in it (%v)", c.argv[0], err)
	}
	return nil, fmt.Errorf("unpack kernel: unknown compression, starts % x", packed[:min(8, len(packed))])
}
