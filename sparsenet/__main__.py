"""``python -m sparsenet`` is the ``sparsenet`` command."""

import sys

from sparsenet.cli import main

sys.exit(main())
