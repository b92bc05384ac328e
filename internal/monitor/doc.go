// SPDX-License-Identifier: Apache-2.0

// Package monitor knows the messages that the programs and the agent send about packets and endpoints: it decodes,
// selects and prints them. Layouts and numbers come from bpf/lib/message.h, the shapes of the lines are those of the
// field's monitors. It owns no state and reads nothing but what it is given.
package monitor
