"""``python -m minopt``, for environments without the script."""

import sys

from minopt.cli import main

sys.exit(main())
