"""Proofs and speed of training on one GPU, without Ray, in a few minutes."""
