"""From files to fixed, verified training data: sources, cleaning, order and loading."""
