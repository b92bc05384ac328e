// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"io"
)

// cpioWriter writes the "newc" archives that the kernel unpacks as its initial
// RAM disk (Documentation/driver-api/early-userspace/buffer-format.rst).
type cpioWriter struct {
	w   io.Writer
	ino int
	off int
	err error
}

const (
	cpioDir  = 0o040755
	cpioFile = 0o100644
	cpioExec = 0o100755
)

// Add writes one entry; mode carries the file type. Errors are kept for Close.
func (c *cpioWriter) Add(name string, mode uint32, data []byte) {
	c.ino++
	links := 1
	if mode&0o170000 == 0o040000 {
		links = 2
	}
	c.write([]byte(fmt.Sprintf("070701%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X",
		c.ino, mode, 0, 0, links, 0, len(data), 0, 0, 0, 0, len(name)+1, 0)))
	c.write([]byte(name + "\x00"))
	c.pad()
	c.write(data)
	c.pad()
}

// Close writes the trailer and returns the first error.
func (c *cpioWriter) Close() error {
	c.ino = -1
	c.Add("TRAILER!!!", 0, nil)
	return c.err
}

func (c *cpioWriter) pad() {
	if n := -c.off & 3; n > 0 {
		c.write(make([]byte, n))
	}
}

func (c *cpioWriter) write(b []byte) {
	if c.err != nil {
		return
	}
	n, err := c.w.Write(b)
	c.off += n
	c.err = err
}
