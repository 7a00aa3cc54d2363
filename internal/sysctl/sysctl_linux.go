package sysctl

import (
	"io"
	"io/fs"

	"golang.org/x/sys/unix"
)

// IsSet reports whether a sysctl has another value than 0. The error is fs.ErrNotExist where the
// kernel does not have it.
func IsSet(path string) (bool, error) {
	var f File
	defer f.Close()

	return f.IsSet(path)
}

// File keeps the file of the sysctl open that was asked for last: to open it takes ten times as
// long as to read it. The zero File has none open. (os.File would have the runtime's poller watch
// it, which takes longer still.)
type File struct {
	path string // "": none is open
	fd   int
}

// IsSet is IsSet, in the network namespace of the thread that opened the file.
func (f *File) IsSet(path string) (set bool, err error) {
	if f.path == path {
		if set, err = f.read(); err == nil {
			return set, nil
		}
	}

	// The interface has gone, or the module, and there may be another one of that name.
	f.Close()

	if f.fd, err = unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0); err != nil {
		return false, &fs.PathError{Op: "open", Path: path, Err: err}
	}

	f.path = path

	return f.read()
}

// Close closes the file. It may be used again.
func (f *File) Close() {
	if f.path != "" {
		_ = unix.Close(f.fd)
		f.path = ""
	}
}

func (f *File) read() (bool, error) {
	var value [16]byte // an int fits

	n, err := unix.Pread(f.fd, value[:], 0)
	if n == 0 && err == nil {
		err = io.ErrUnexpectedEOF
	}

	if err != nil {
		return false, &fs.PathError{Op: "read", Path: f.path, Err: err}
	}

	return string(value[:n]) != "0\n", nil
}
