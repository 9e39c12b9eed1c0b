"""Pure decisions: types, events, commands, health, capacity, policy and the job's state machine.

Standard library only, and of it nothing that reads a clock, a random source, a file or a socket: time arrives inside
events. What does I/O belongs to `controller`, what knows torch to `trainer`.
"""
