"""The training loop of one rank in pure torch: batches, loss, gradients, optimizer, evaluation."""
