"""Dynamic batching: the queues of waiting requests, which of them the next run takes, and who runs it."""
