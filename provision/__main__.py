"""`python -m provision`."""

import sys

try:
    from provision.cli import main
except KeyboardInterrupt:  # before the command could take it: nothing has begun
    from provision.ending import interrupted_early

    sys.exit(interrupted_early())

main()
