"""Sharded, verified checkpoints of training state, committed atomically. Independent of training loops and Ray."""
