"""``python -m lissom``: the same as the command ``lissom``."""

import sys

from lissom.cli import main

sys.exit(main())
