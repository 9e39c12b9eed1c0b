"""regrow: keeps distributed PyTorch training running on whatever hardware is left.

The straight line is heartbeat -> verdict -> capacity -> plan -> conversion -> generation -> relaunch; ARCHITECTURE.md
names the file of each step. Import nothing heavy here: agents import `orchestrator.wire` through this package.
"""
