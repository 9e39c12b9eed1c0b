"""The HTTP API, the agents' connections and authentication; no decision is made here."""
