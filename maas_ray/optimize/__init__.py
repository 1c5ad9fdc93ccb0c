"""From a checkpoint to a bundle: export and the gate that proves it."""
