// SPDX-License-Identifier: Apache-2.0

package netdev

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"
	"syscall"
)

const procSysNet = "/proc/sys/net/"

// setSysctl writes a value below net/ of the thread's namespace if it differs. name has slashes: device names may have
// dots. It reports whether something was written.
func setSysctl(name, value string) (bool, error) {
	current, err := getSysctl(name)
	if err != nil {
		return false, err
	}
	if current == value {
		return false, nil
	}
	if err := writeSysctl(name, value); err != nil {
		return false, err
	}
	return true, nil
}

func getSysctl(name string) (string, error) {
	data, err := os.ReadFile(procSysNet + name)
	if err != nil {
		return "", fmt.Errorf("sysctl: %w", err)
	}
	return strings.TrimSpace(string(data)), nil
}

func writeSysctl(name, value string) error {
	f, err := os.OpenFile(procSysNet+name, os.O_WRONLY, 0)
	if err == nil {
		_, err = f.WriteString(value)
		err = errors.Join(err, f.Close())
	}
	if errors.Is(err, syscall.EROFS) || errors.Is(err, fs.ErrPermission) {
		return fmt.Errorf("sysctl net/%s=%s: %w; the agent's container must be privileged", name, value, err)
	}
	if err != nil {
		return fmt.Errorf("sysctl net/%s=%s: %w", name, value, err)
	}
	return nil
}
