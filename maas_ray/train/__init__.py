"""Training: objective, checkpoints, the loop in pure torch, and the run on Ray Train."""
