// SPDX-License-Identifier: Apache-2.0

package v2

import (
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// UnusedAnnotation is set by the operator, to the time, when no CiliumEndpoint has the identity any more. An agent that
// needs the identity removes it; otherwise the operator deletes the object after the time of grace.
const UnusedAnnotation = "lash.io/unused-since"

// CiliumIdentity is the labels behind a security identity. Its name is the number.
type CiliumIdentity struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata"`

	SecurityLabels map[string]string `json:"security-labels"` // "k8s:app": "web"
}

// CiliumIdentityList is a list of CiliumIdentities.
type CiliumIdentityList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata"`

	Items []CiliumIdentity `json:"items"`
}
