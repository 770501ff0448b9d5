"""The training step, and the story of a run.

loop.py           train(): from a config and a directory to a trained model
start.py          the state that a run begins with
step.py           one step as a pure function, and the state it maps
optim.py          AdamW, muon, schedules
spikes.py         which steps are skipped
held_out_loss.py  the evaluator that every run has
clock.py          where the time of a run goes
"""
