// SPDX-License-Identifier: Apache-2.0

package cni

import "fmt"

// Codes of the CNI specification 1.1, section "Error"; from 100 on they are the plugin's own.
const (
	CodeIncompatibleVersion = 1
	CodeUnknownContainer    = 3
	CodeInvalidEnvironment  = 4
	CodeIO                  = 5
	CodeDecode              = 6
	CodeInvalidConfig       = 7
	CodeTryAgainLater       = 11
	CodeNotAvailable        = 50
	CodeCheckFailed         = 100
	CodeInternal            = 101
)

// Error is a failure as the runtime gets to see it. Msg says what is wrong with which field, Details what to do.
type Error struct {
	Code    int    `json:"code"`
	Msg     string `json:"msg"`
	Details string `json:"details,omitempty"`
}

func (e *Error) Error() string {
	if e.Details == "" {
		return e.Msg
	}
	return e.Msg + "; " + e.Details
}

// Errorf makes an Error of a code and a message; the remedy may be added with [Error.With].
func Errorf(code int, format string, args ...any) *Error {
	return &Error{Code: code, Msg: fmt.Sprintf(format, args...)}
}

// With returns the error with a remedy.
func (e *Error) With(format string, args ...any) *Error {
	return &Error{Code: e.Code, Msg: e.Msg, Details: fmt.Sprintf(format, args...)}
}
