"""Dynamic batching: queues of waiting requests, selection of the next batch, and execution of the run."""
