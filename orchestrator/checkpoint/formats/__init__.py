"""One module per checkpoint format: each builds the universal view of its files, and writes them where it can."""
