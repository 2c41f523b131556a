"""Runs the command as `python -m provision`."""

import sys

try:
    from provision.cli.main import main
except KeyboardInterrupt:  # Ctrl-C during the imports, before the command's own handler; nothing was changed
    from provision.core.command_end import interrupted_early

    sys.exit(interrupted_early())

main()
