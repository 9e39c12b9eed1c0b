"""Checkpoints made by real runs of other tools, with the live state beside them: what readers and writers are held to.

`cases` says what is made, `deepspeed_maker` makes it under torchrun in an environment of its own (`environment`), and
`data` is what a test asks. Nothing here imports regrow: what the readers are compared with must not come from them.
"""
