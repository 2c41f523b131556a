"""`python -m bench`."""

import sys

try:
    from bench.cli import main
except KeyboardInterrupt:  # before the command could take it: nothing has begun
    from provision.ending import interrupted_early

    sys.exit(interrupted_early())

main()
