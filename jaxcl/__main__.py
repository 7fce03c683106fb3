"""``python -m jaxcl`` is the ``jaxcl`` command."""

import sys

from jaxcl.cli import main

sys.exit(main())
