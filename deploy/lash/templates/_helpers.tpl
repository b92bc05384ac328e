{{/* The routing mode, from its present name or from the old value "tunnel". */}}
{{- define "lash.routingMode" -}}
{{- $mode := .Values.routingMode -}}
{{- if .Values.tunnel -}}
{{- $mode = ternary "native" "tunnel" (eq .Values.tunnel "disabled") -}}
{{- end -}}
{{- if ne $mode "native" -}}
{{- fail (printf "routingMode=%s is not supported by this version, which routes natively: set routingMode=native and, if all nodes share a link, autoDirectNodeRoutes=true" $mode) -}}
{{- end -}}
{{- $mode -}}
{{- end -}}

{{- define "lash.kubeProxyReplacement" -}}
{{- $v := toString .Values.kubeProxyReplacement -}}
{{- if has $v (list "strict" "probe" "partial") -}}true
{{- else if eq $v "disabled" -}}false
{{- else -}}{{ $v }}
{{- end -}}
{{- end -}}

{{- define "lash.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end -}}

{{/* The API server, for a pod that must reach it before services work. */}}
{{- define "lash.apiServerEnv" -}}
{{- if .Values.k8sServiceHost }}
- name: KUBERNETES_SERVICE_HOST
  value: {{ .Values.k8sServiceHost | quote }}
- name: KUBERNETES_SERVICE_PORT
  value: {{ .Values.k8sServicePort | default 6443 | toString | quote }}
{{- end }}
{{- end -}}
