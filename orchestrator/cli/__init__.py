"""The command `regrow`: arguments in, a frontend's function called, one sentence and an exit code out.

Commands import what they need beyond the command line itself when they run: `regrow --help` stays fast.
"""

from orchestrator.cli.program import main

__all__ = ["main"]
