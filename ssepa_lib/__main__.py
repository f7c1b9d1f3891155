"""`python -m ssepa_lib`."""

import sys

from ssepa_lib.cli import main

if __name__ == "__main__":
    sys.exit(main())
