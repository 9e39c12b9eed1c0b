"""Health readings of a host: one module per source."""
