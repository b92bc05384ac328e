// SPDX-License-Identifier: Apache-2.0

package netdev

import (
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Ethtool reads or sets what a command with one number is about (unix.ETHTOOL_GGRO, ETHTOOL_SGRO and the like), of a device
// in the calling thread's namespace.
func Ethtool(name string, command, value uint32) (uint32, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, os.NewSyscallError("socket", err)
	}
	defer unix.Close(fd)
	arg := struct{ command, value uint32 }{command, value} // struct ethtool_value
	request := struct {                                    // struct ifreq
		name [unix.IFNAMSIZ]byte
		data unsafe.Pointer
		_    [16]byte
	}{data: unsafe.Pointer(&arg)}
	copy(request.name[:unix.IFNAMSIZ-1], name)
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.SIOCETHTOOL, uintptr(unsafe.Pointer(&request))); errno != 0 {
		return 0, os.NewSyscallError("ioctl", errno)
	}
	return arg.value, nil
}
