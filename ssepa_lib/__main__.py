"""`python -m ssepa_lib`."""

import signal
import sys

from ssepa_lib.cli import main

if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that locks are released
    sys.exit(main())
