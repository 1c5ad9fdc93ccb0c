"""Training state in the store: sharded, verified, committed or not there at all. Knows no training loop and no Ray."""
