"""The asyncio shell around `core.job`: persist, run commands, feed their results back; journal and metrics."""
