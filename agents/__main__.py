"""`python -m agents`: the command line of the agent."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from collections.abc import Sequence

from agents.agent import Agent
from agents.processes import die_with_parent
from agents.settings import check_import_name, parse
from orchestrator.core.errors import RegrowError


def main(argv: Sequence[str]) -> int:
    """Run an agent; returns 0 after SIGTERM or SIGINT, else the exit code of the error that it says on stderr."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", level=logging.INFO, stream=sys.stderr)
    try:
        settings = parse(argv, os.environ)
        if settings.parent is not None:
            die_with_parent(settings.parent)
        check_import_name()
        asyncio.run(Agent(settings).run())
    except RegrowError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
