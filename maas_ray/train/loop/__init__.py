"""The training loop of one rank in plain torch: batches, loss, gradients, steps."""
