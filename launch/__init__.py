"""The commands, one file each."""

import warm_dist  # noqa: F401  # so that Ctrl-C ends a command from here on
