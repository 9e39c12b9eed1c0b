"""The HTTP API, the agents' connections and authentication; no decision is made here.

`app.create_app` puts the routes together, `serving.serve` listens; what they say and hear goes to a `host.Host`
(the controller). Every route but `/healthz` needs the token.
"""
