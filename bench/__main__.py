"""`python -m bench`."""

import sys

try:
    from bench.cli.main import main
except KeyboardInterrupt:  # before the command could take it: nothing has begun
    from provision.core.command_end import interrupted_early

    sys.exit(interrupted_early())

main()
