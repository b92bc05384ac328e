// SPDX-License-Identifier: Apache-2.0

// Package crd holds the CustomResourceDefinitions of the group cilium.io that Lash serves, embedded as the YAML in this
// directory. The operator installs them.
//
// CiliumNode is validated; the policy kinds keep every field, so that objects users already have are accepted.
package crd

import (
	"embed"
	"fmt"

	apiextensionsv1 "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/v1"
	"sigs.k8s.io/yaml"
)

// ManagedBy labels definitions that Lash installed and may update; others are left alone.
const (
	ManagedByLabel = "app.kubernetes.io/managed-by"
	ManagedBy      = "lash"
)

//go:embed *.yaml
var files embed.FS

// All returns fresh copies of all definitions, sorted by name.
func All() ([]*apiextensionsv1.CustomResourceDefinition, error) {
	entries, err := files.ReadDir(".")
	if err != nil {
		return nil, err
	}
	var crds []*apiextensionsv1.CustomResourceDefinition
	for _, e := range entries {
		b, err := files.ReadFile(e.Name())
		if err != nil {
			return nil, err
		}
		c := &apiextensionsv1.CustomResourceDefinition{}
		if err := yaml.UnmarshalStrict(b, c); err != nil {
			return nil, fmt.Errorf("%s: %w", e.Name(), err)
		}
		if c.Labels == nil {
			c.Labels = map[string]string{}
		}
		c.Labels[ManagedByLabel] = ManagedBy
		crds = append(crds, c)
	}
	return crds, nil
}
