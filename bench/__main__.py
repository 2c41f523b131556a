"""Runs the command `bench` for `python -m bench`."""

import sys

try:
    from bench.cli.main import main
except KeyboardInterrupt:  # the command has not begun, so it cannot handle it
    from provision.core.command_end import interrupted_early

    sys.exit(interrupted_early())

main()
