//go:build !linux

package tool

import (
	"context"
	"errors"
	"time"
)

func list(context.Context, output) error { return errors.ErrUnsupported }

func check(context.Context, output) error { return errors.ErrUnsupported }

func explain(_ context.Context, _ output, port string, _ time.Duration) error {
	if _, err := parseEndpoint(port); err != nil {
		return err
	}

	return errors.ErrUnsupported
}

func clean(context.Context, output) error { return errors.ErrUnsupported }
