"""``python -m togi`` is the ``togi`` command."""

import sys

from togi.cli.main import main

sys.exit(main())
