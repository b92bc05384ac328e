// SPDX-License-Identifier: Apache-2.0

package sysdump

import (
	"bytes"
	"encoding/json"
	"regexp"
	"slices"
	"strings"
	"unicode"
)

// removed stands for what was a secret.
const removed = "[redacted]"

// redact takes secrets out of a file: of JSON by the names of its fields, of any text by what secrets look like. It would
// rather take too much.
func redact(data []byte) []byte {
	var v any
	d := json.NewDecoder(bytes.NewReader(data))
	d.UseNumber()
	if d.Decode(&v) != nil || d.More() {
		return []byte(redactText(string(data)))
	}
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	e.SetIndent("", "  ")
	if e.Encode(redactValue(v)) != nil {
		return []byte(redactText(string(data)))
	}
	return b.Bytes()
}

// dropped are fields of objects that repeat others, secrets included.
var dropped = []string{"kubectl.kubernetes.io/last-applied-configuration", "managedFields"}

func redactValue(v any) any {
	switch v := v.(type) {
	case string:
		return redactText(v)
	case []any:
		follows := false // an argument after a flag like --token
		for i, x := range v {
			s, isText := x.(string)
			switch {
			case isText && follows && !strings.HasPrefix(s, "-"):
				v[i], follows = removed, false
			default:
				v[i] = redactValue(x)
				follows = isText && strings.HasPrefix(s, "-") && !strings.Contains(s, "=") && sensitive(s)
			}
		}
		return v
	case map[string]any:
		// An environment variable, or anything else that has its name beside its value.
		for _, name := range []string{"name", "key"} {
			if n, ok := v[name].(string); ok && sensitive(n) {
				if _, ok := v["value"].(string); ok {
					v["value"] = removed
				}
			}
		}
		for k, x := range v {
			switch {
			case slices.Contains(dropped, k):
				delete(v, k)
			case sensitive(k):
				v[k] = hide(x)
			default:
				v[k] = redactValue(x)
			}
		}
		return v
	}
	return v
}

// hide removes the texts of a field whose name says that they are secret. What is below it has names of its own.
func hide(v any) any {
	switch v := v.(type) {
	case string:
		if v == "" {
			return v
		}
		return removed
	case []any:
		for i := range v {
			v[i] = hide(v[i])
		}
		return v
	case map[string]any:
		return redactValue(v)
	}
	return v
}

// secretWords are words of names that say that the value is secret, alone or with another before them.
var (
	secretWords = []string{"password", "passwd", "passphrase", "secret", "secrets", "token", "tokens", "credential", "credentials", "authorization", "apikey", "accesskey", "privatekey", "psk", "dockercfg", "dockerconfigjson"}
	keyWords    = []string{"api", "access", "private", "secret", "encryption", "encrypt", "auth", "signing", "ssh", "ipsec", "client", "shared", "master"}
	// harmless end names whose value names a secret, or says something of it, and is none.
	harmless = []string{"name", "names", "namespace", "path", "file", "ref", "type", "kind", "mode", "id", "count", "seconds", "expiration", "enabled", "requests", "keys"}
)

// sensitive reports whether a name says that its value is secret.
func sensitive(name string) bool {
	words := wordsOf(name)
	if len(words) == 0 || slices.Contains(harmless, words[len(words)-1]) {
		return false
	}
	for i, w := range words {
		if slices.Contains(secretWords, w) || w == "key" && i > 0 && slices.Contains(keyWords, words[i-1]) {
			return true
		}
	}
	return false
}

// wordsOf splits names of any style: DB_PASSWORD, apiKey, APIKey, private-key.
func wordsOf(name string) []string {
	var words []string
	var word []rune
	end := func() {
		if len(word) > 0 {
			words = append(words, strings.ToLower(string(word)))
			word = nil
		}
	}
	runes := []rune(name)
	for i, r := range runes {
		switch {
		case !unicode.IsLetter(r):
			end()
			continue
		case unicode.IsUpper(r) && i > 0 && (unicode.IsLower(runes[i-1]) || i+1 < len(runes) && unicode.IsLower(runes[i+1])):
			end()
		}
		word = append(word, r)
	}
	end()
	return words
}

// patterns are what secrets look like in text; what stands for them.
var patterns = []struct {
	looks *regexp.Regexp
	with  string
}{
	{regexp.MustCompile(`(?s)-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(-----END [A-Z ]*PRIVATE KEY-----|$)`), removed},
	{regexp.MustCompile(`\beyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*`), removed}, // JSON web tokens
	{regexp.MustCompile(`(?i)\b(bearer|basic)\s+[\w+/.~-]{8,}=*`), "$1 " + removed},
	{regexp.MustCompile(`://[^/\s:@"]+:[^/\s@"]+@`), "://" + removed + "@"},
	{regexp.MustCompile(`\bAKIA[0-9A-Z]{16}\b`), removed},
	{regexp.MustCompile(`\bgh[pousr]_\w{20,}`), removed},
	{regexp.MustCompile(`(?i)(\b[\w.-]*(?:password|passwd|passphrase|secret|token|credential|api[_-]?key|private[_-]?key|access[_-]?key)["']?\s*[=:]\s*)("[^"]*"|'[^']*'|[^\s,;&"'\[{]+)`), "${1}" + removed},
}

func redactText(s string) string {
	for _, p := range patterns {
		s = p.looks.ReplaceAllString(s, p.with)
	}
	return s
}
