"""What a training script imports: the session, its channel to the agent, state and sampling."""
