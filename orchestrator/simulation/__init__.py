"""Virtual-time host of the same core: seeded failures or a capacity trace, policies, and where the time went.

`failures` and `traces` say what happens to which node and when, the same for every policy; `timing` how long detection,
conversion and restart take; `world` drives the real `core.job` and the real planner through it, jumping from one thing
that matters to the next; `account` divides the time by what it was spent on; `study` runs policies over seeds.
No clock and no randomness but seeds: the same study gives the same report, byte for byte.
"""
