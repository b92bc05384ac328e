// SPDX-License-Identifier: Apache-2.0

package config

import "strings"

// Nearest returns the candidate a user most likely meant by name, or "" if none is close: the smallest edit distance,
// at most a third of the name's length; failing that, a candidate whose last dotted or dashed part is the name.
func Nearest(name string, candidates []string) string {
	best, bestDist := "", len(name)/3+1
	lower := strings.ToLower(name)
	for _, c := range candidates {
		if d := distance(lower, strings.ToLower(c)); d < bestDist {
			best, bestDist = c, d
		}
	}
	if best != "" {
		return best
	}
	for _, c := range candidates {
		cl := strings.ToLower(c)
		if strings.HasSuffix(cl, "."+lower) || strings.HasSuffix(lower, "."+cl) || len(lower) >= 4 && strings.HasSuffix(cl, "-"+lower) {
			return c
		}
	}
	return ""
}

// distance is the number of characters to insert, delete, replace or swap with a neighbour to get from a to b.
func distance(a, b string) int {
	prev2, prev, cur := make([]int, len(b)+1), make([]int, len(b)+1), make([]int, len(b)+1)
	for j := range prev {
		prev[j] = j
	}
	for i := 1; i <= len(a); i++ {
		cur[0] = i
		for j := 1; j <= len(b); j++ {
			cost := 1
			if a[i-1] == b[j-1] {
				cost = 0
			}
			cur[j] = min(prev[j]+1, cur[j-1]+1, prev[j-1]+cost)
			if i > 1 && j > 1 && a[i-1] == b[j-2] && a[i-2] == b[j-1] {
				cur[j] = min(cur[j], prev2[j-2]+1)
			}
		}
		prev2, prev, cur = prev, cur, prev2
	}
	return prev[len(b)]
}
