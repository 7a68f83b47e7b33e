"""`python -m trilogue` is the command line."""

import sys

from trilogue.cli.main import main

sys.exit(main())
