package sysctl

import (
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/cri-o/hostport/internal/testbed"
)

func TestIsSet(t *testing.T) {
	t.Parallel()

	path := filepath.Join(t.TempDir(), "sysctl")

	_, err := IsSet(path)
	require.ErrorIs(t, err, fs.ErrNotExist)
	require.ErrorContains(t, err, path)

	for text, want := range map[string]bool{"0\n": false, "1\n": true, "-1\n": true, "2147483647\n": true} {
		require.NoError(t, os.WriteFile(path, []byte(text), 0o600))

		set, err := IsSet(path)
		require.NoError(t, err)
		assert.Equal(t, want, set, text)
	}

	require.NoError(t, os.WriteFile(path, nil, 0o600))

	_, err = IsSet(path)
	require.Error(t, err)
}

// A file that is open says what is so now, of the interface that there is now.
func TestFile(t *testing.T) {
	t.Parallel()

	bed, err := testbed.New()
	require.NoError(t, err)
	t.Cleanup(func() { assert.NoError(t, bed.Close()) })

	var f File
	defer f.Close()

	isSet := func(device string, want bool) {
		t.Helper()
		require.NoError(t, bed.Host.Do(func() error {
			set, err := f.IsSet("/proc/sys/net/ipv4/conf/" + device + "/route_localnet")
			assert.Equal(t, want, set)

			return err
		}))
	}

	require.NoError(t, bed.Host.AddDevice("one", true))
	isSet("one", false)
	require.NoError(t, bed.Host.Sysctl("net/ipv4/conf/one/route_localnet", "1"))
	isSet("one", true)
	isSet("lo", false)
	isSet("one", true)
	require.NoError(t, bed.Host.RemoveDevice("one"))
	require.ErrorIs(t, bed.Host.Do(func() error {
		_, err := f.IsSet("/proc/sys/net/ipv4/conf/one/route_localnet")

		return err
	}), fs.ErrNotExist)
	require.NoError(t, bed.Host.AddDevice("one", true))
	isSet("one", false)
}

// One file is open at the most, and none after Close.
func TestClose(t *testing.T) {
	t.Parallel()

	dir := t.TempDir()
	open := func() (paths []string) {
		fds, err := filepath.Glob("/proc/self/fd/*")
		require.NoError(t, err)

		for _, fd := range fds {
			if path, _ := os.Readlink(fd); filepath.Dir(path) == dir { // other tests open and close others
				paths = append(paths, filepath.Base(path))
			}
		}

		return paths
	}

	var f File

	for _, name := range []string{"one", "other", "other"} {
		path := filepath.Join(dir, name)
		require.NoError(t, os.WriteFile(path, []byte("1\n"), 0o600))

		_, err := f.IsSet(path)
		require.NoError(t, err)
		assert.Equal(t, []string{name}, open())

		_, err = IsSet(path)
		require.NoError(t, err)
		assert.Equal(t, []string{name}, open())
	}

	_, err := f.IsSet(filepath.Join(dir, "none"))
	require.ErrorIs(t, err, fs.ErrNotExist)
	assert.Empty(t, open())

	_, err = f.IsSet(filepath.Join(dir, "one"))
	require.NoError(t, err)
	f.Close()
	f.Close()
	assert.Empty(t, open())
}
