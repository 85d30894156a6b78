"""Lanes: drafting while verifying. Every schedule is one file; `tokens.py` is the token logic that all share.

clock.py      a deterministic event clock on which schedules run in modelled time
threads.py    the same schedules on real threads
tokens.py     what is committed, and the engine's own acceptance rule over it
plain.py      what lanes are compared with: no look-ahead, and draft, verify, draft, verify
pearl.py      PEARL: the draft goes on while the target verifies
pipeinfer.py  PipeInfer: many runs in flight along a pipeline, with cancellation
seed.py       SEED: several texts drafted side by side for one target
choice.py     whether lanes pay, from measured times
"""
