"""The training step, and the story of a run."""
