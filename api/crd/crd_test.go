// SPDX-License-Identifier: Apache-2.0

package crd

import (
	"strings"
	"testing"

	"k8s.io/apiextensions-apiserver/pkg/apis/apiextensions"
	apiextensionsv1 "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/v1"
	crdvalidation "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/validation"
	schemavalidation "k8s.io/apiextensions-apiserver/pkg/apiserver/validation"
	"sigs.k8s.io/yaml"
)

func TestDefinitionsAreValid(t *testing.T) {
	crds, err := All()
	if err != nil {
		t.Fatal(err)
	}
	if len(crds) != 5 {
		t.Errorf("%d definitions, want 5", len(crds))
	}
	for _, c := range crds {
		if errs := crdvalidation.ValidateCustomResourceDefinition(t.Context(), internal(t, c)); len(errs) > 0 {
			t.Errorf("%s: %v", c.Name, errs.ToAggregate())
		}
		if c.Labels[ManagedByLabel] != ManagedBy {
			t.Errorf("%s lacks the label that says it is ours", c.Name)
		}
	}
}

// TestObjects checks what the API server will say to an object: nothing, or an error that names the field.
func TestObjects(t *testing.T) {
	for _, tt := range []struct{ name, kind, object, want string }{
		{"node", "CiliumNode", `spec: {addresses: [{type: InternalIP, ip: 192.0.2.1}, {type: CiliumInternalIP, ip: "fd00::1"}], ipam: {podCIDRs: [10.0.1.0/24, "fd00::100/120"]}}`, ""},
		{"node of another version", "CiliumNode", `spec: {alibaba-cloud: {}, azure: {}, eni: {}, health: {ipv4: 10.0.0.2, ipv6: ""}, ipam: {pools: {}}, ingress: {}}`, ""},
		{"node status", "CiliumNode", `{spec: {}, status: {ipam: {used: {10.0.0.1: {owner: router}}, operator-status: {error: x}}, azure: {}}}`, ""},
		{"no spec", "CiliumNode", `{}`, "spec"},
		{"address is no IP", "CiliumNode", `spec: {addresses: [{type: InternalIP, ip: node-1}]}`, "spec.addresses[0].ip"},
		{"address with prefix", "CiliumNode", `spec: {addresses: [{type: InternalIP, ip: 192.0.2.1/24}]}`, "spec.addresses[0].ip"},
		{"address without type", "CiliumNode", `spec: {addresses: [{ip: 192.0.2.1}]}`, "spec.addresses[0].type"},
		{"address without ip", "CiliumNode", `spec: {addresses: [{type: InternalIP}]}`, "spec.addresses[0].ip"},
		{"addresses is a map", "CiliumNode", `spec: {addresses: {InternalIP: 192.0.2.1}}`, "spec.addresses"},
		{"pod CIDR is an address", "CiliumNode", `spec: {ipam: {podCIDRs: [10.0.1.0]}}`, "spec.ipam.podCIDRs[0]"},
		{"pod CIDR prefix too long", "CiliumNode", `spec: {ipam: {podCIDRs: [10.0.1.0/24, 10.0.1.0/33]}}`, "spec.ipam.podCIDRs[1]"},
		{"pod CIDRs is a string", "CiliumNode", `spec: {ipam: {podCIDRs: 10.0.1.0/24}}`, "spec.ipam.podCIDRs"},
		{"encryption key", "CiliumNode", `spec: {encryption: {key: 256}}`, "spec.encryption.key"},
		{"health address", "CiliumNode", `spec: {health: {ipv4: "fd00::1"}}`, "spec.health.ipv4"},
		{"node identity", "CiliumNode", `spec: {nodeidentity: -1}`, "spec.nodeidentity"},
		{"used", "CiliumNode", `{spec: {}, status: {ipam: {used: {10.0.0.1: router}}}}`, "status.ipam.used.10.0.0.1"},
		{"identity", "CiliumIdentity", `security-labels: {"k8s:app": web}`, ""},
		{"identity without labels", "CiliumIdentity", `{}`, "security-labels"},
		{"endpoint number", "CiliumEndpoint", `status: {id: 70000}`, "status.id"},
		{"policy", "CiliumNetworkPolicy", `spec: {endpointSelector: {}, ingress: [{fromEntities: [cluster]}]}`, ""},
		{"policy with specs", "CiliumClusterwideNetworkPolicy", `specs: [{nodeSelector: {}}]`, ""},
		{"policy with a list as spec", "CiliumNetworkPolicy", `spec: [{endpointSelector: {}}]`, "spec"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			obj := map[string]any{}
			if err := yaml.Unmarshal([]byte(tt.object), &obj); err != nil {
				t.Fatal(err)
			}
			obj["apiVersion"], obj["kind"], obj["metadata"] = "cilium.io/v2", tt.kind, map[string]any{"name": "x"}
			errs := schemavalidation.ValidateCustomResource(nil, obj, validator(t, tt.kind))
			var text string
			if err := errs.ToAggregate(); err != nil {
				text = err.Error()
			}
			if (text == "") != (tt.want == "") || !strings.Contains(text, tt.want) {
				t.Errorf("got %q, want %q", text, tt.want)
			}
		})
	}
}

func validator(t *testing.T, kind string) schemavalidation.SchemaValidator {
	t.Helper()
	crds, err := All()
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range crds {
		if c.Spec.Names.Kind == kind {
			// The conversion moves the one version's schema to the top.
			v, _, err := schemavalidation.NewSchemaValidator(internal(t, c).Spec.Validation.OpenAPIV3Schema)
			if err != nil {
				t.Fatal(err)
			}
			return v
		}
	}
	t.Fatalf("no definition of %s", kind)
	return nil
}

func internal(t *testing.T, c *apiextensionsv1.CustomResourceDefinition) *apiextensions.CustomResourceDefinition {
	t.Helper()
	apiextensionsv1.SetObjectDefaults_CustomResourceDefinition(c)
	apiextensionsv1.SetDefaults_CustomResourceDefinitionSpec(&c.Spec)
	out := &apiextensions.CustomResourceDefinition{}
	if err := apiextensionsv1.Convert_v1_CustomResourceDefinition_To_apiextensions_CustomResourceDefinition(c, out, nil); err != nil {
		t.Fatal(err)
	}
	out.Status.StoredVersions = []string{"v2"}
	return out
}
