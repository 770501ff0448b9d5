"""The files of a run: workdir, log and checkpoints."""
