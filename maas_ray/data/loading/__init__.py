"""From a prepared data set to the batches of one rank, in a reproducible order."""
