"""``python -m seqjax`` is the ``seqjax`` command."""

import sys

from seqjax.cli._process import entry

sys.exit(entry())
