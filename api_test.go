package hostport

import (
	"bytes"
	"go/ast"
	"go/build"
	"go/format"
	"go/parser"
	"go/token"
	"go/types"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// What callers can name is a promise to them: testdata/api.txt is read before it is changed. To
// write it anew: HOSTPORT_UPDATE=1 go test -run TestAPI .
func TestAPI(t *testing.T) {
	t.Parallel()

	const golden = "testdata/api.txt"

	var all []string
	for _, dir := range []string{".", "hostporttest"} {
		all = append(append(all, "// "+dir), exported(t, dir)...)
	}

	got := strings.Join(all, "\n") + "\n"

	if os.Getenv("HOSTPORT_UPDATE") != "" {
		require.NoError(t, os.WriteFile(golden, []byte(got), 0o644))
	}

	want, err := os.ReadFile(golden)
	require.NoError(t, err)
	assert.Equal(t, string(want), got)
}

// exported returns the declarations of a package that callers can name, sorted.
func exported(t *testing.T, dir string) []string {
	t.Helper()

	pkg, err := build.ImportDir(dir, 0)
	require.NoError(t, err)

	var all []string

	for _, name := range pkg.GoFiles {
		files := token.NewFileSet()
		file, err := parser.ParseFile(files, filepath.Join(dir, name), nil, parser.SkipObjectResolution)
		require.NoError(t, err)
		ast.FileExports(file)

		for _, decl := range file.Decls {
			if f, ok := decl.(*ast.FuncDecl); ok {
				if f.Body = nil; f.Recv != nil && !ast.IsExported(strings.TrimPrefix(types.ExprString(f.Recv.List[0].Type), "*")) {
					continue
				}
			}

			if d, ok := decl.(*ast.GenDecl); ok && d.Tok == token.IMPORT {
				continue
			}

			var text bytes.Buffer
			require.NoError(t, format.Node(&text, files, decl))
			all = append(all, strings.ReplaceAll(text.String(), "\n\n", "\n")) // comments are not part of it
		}
	}

	slices.Sort(all)

	return all
}
