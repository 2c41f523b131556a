"""`python -m provision`."""

import sys

try:
    from provision.cli import main

    main()
except KeyboardInterrupt:  # before the command could take it: nothing has begun
    sys.exit(130)
