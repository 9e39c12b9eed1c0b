"""The command `regrow`: arguments in, a frontend's function called, one sentence and an exit code out.

Every command is a module of its own, imported when it is asked for; what it needs beyond the standard library it
imports when it runs.
"""

from orchestrator.cli.program import main

__all__ = ["main"]
