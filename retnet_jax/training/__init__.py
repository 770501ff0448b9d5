"""The training step, and the loop of a training run.

loop.py           train(): from a config and a directory to a trained model
start.py          the state that a run begins with
announce.py       what a run prints when it starts
step.py           one step as a pure function, and the training state
optim.py          AdamW, muon, schedules
spikes.py         which steps are skipped
held_out_loss.py  the evaluator that every run has
clock.py          time in steps, waiting for data, in checkpoints and in evaluation
"""
