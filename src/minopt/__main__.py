"""``python -m minopt``."""

import os
import sys

from minopt.cli import main

code = main()
if os.environ.get("WORLD_SIZE", "1") != "1":
    # gloo's threads outlive their group, and now and then abort an interpreter that takes itself apart beneath them.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
sys.exit(code)
