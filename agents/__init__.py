"""The program on every node: probes it, reports it, and makes its workers what the controller says they should be.

Users never import it. It stays small: torch is imported in `agents.torchrun` alone, which runs in a process of its own.
"""
