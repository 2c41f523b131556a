"""`python -m bench`."""

import sys

try:
    from bench.cli import main

    main()
except KeyboardInterrupt:  # before the command could take it: nothing has begun
    sys.exit(130)
