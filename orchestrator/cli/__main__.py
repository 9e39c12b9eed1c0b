"""`python -m orchestrator.cli`."""

import sys

from orchestrator.cli.program import main

sys.exit(main())
