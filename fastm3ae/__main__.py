"""``python -m fastm3ae`` is the ``fastm3ae`` command."""

import sys

from fastm3ae.cli import main

sys.exit(main())
