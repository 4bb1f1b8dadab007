"""``python -m seqjax`` is the ``seqjax`` command."""

import sys

from seqjax.cli import main

sys.exit(main())
