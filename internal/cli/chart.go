// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"errors"
	"fmt"
	"io/fs"
	"strings"

	"helm.sh/helm/v3/pkg/chart"
	"helm.sh/helm/v3/pkg/chart/loader"
	"helm.sh/helm/v3/pkg/chartutil"
	"helm.sh/helm/v3/pkg/engine"
	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/yaml"

	"github.com/lash-net/lash/deploy"
	"github.com/lash-net/lash/internal/config"
)

// loadChart reads the embedded chart.
func loadChart() (*chart.Chart, error) {
	var files []*loader.BufferedFile
	err := fs.WalkDir(deploy.Chart, "lash", func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		b, err := deploy.Chart.ReadFile(path)
		files = append(files, &loader.BufferedFile{Name: strings.TrimPrefix(path, "lash/"), Data: b})
		return err
	})
	if err != nil {
		return nil, err
	}
	return loader.LoadFiles(files)
}

// checkValues renders the chart as the cluster would get it and checks the configuration in it, so that a mistake shows
// here and not in the log of an agent. It returns what the configuration remarks.
func checkValues(c *chart.Chart, values map[string]any, namespace string) ([]string, error) {
	full, err := chartutil.ToRenderValues(c, values, chartutil.ReleaseOptions{Name: releaseName, Namespace: namespace, IsInstall: true, Revision: 1}, nil)
	if err != nil {
		return nil, schemaError(err)
	}
	rendered, err := engine.Render(c, full)
	if err != nil {
		return nil, templateError(err)
	}
	var cm corev1.ConfigMap
	if err := yaml.Unmarshal([]byte(rendered[c.Name()+"/templates/configmap.yaml"]), &cm); err != nil {
		return nil, fmt.Errorf("ConfigMap lash-config: %w", err)
	}
	conf, err := config.FromMap("ConfigMap lash-config", cm.Data)
	if err != nil {
		return nil, err
	}
	return conf.Notes(), nil
}

// schemaError shortens Helm's report on a value of the wrong kind to the lines that name values.
func schemaError(err error) error {
	var lines []error
	for _, l := range strings.Split(err.Error(), "\n") {
		l = strings.TrimSpace(l)
		if at, ok := strings.CutPrefix(l, "- at '"); ok {
			if path, problem, ok := strings.Cut(at, "': "); ok {
				lines = append(lines, fmt.Errorf("%s: %s", strings.ReplaceAll(strings.TrimPrefix(path, "/"), "/", "."), problem))
				continue
			}
		}
	}
	if len(lines) == 0 {
		return err
	}
	return fmt.Errorf("%w\nsee 'lash install --show-values' for what each value may be", errors.Join(lines...))
}

// templateError keeps of a template's failure what the template said.
func templateError(err error) error {
	text := err.Error()
	if _, said, ok := strings.Cut(text, "execution error at ("); ok {
		if _, said, ok := strings.Cut(said, "): "); ok {
			return errors.New(said)
		}
	}
	return err
}
