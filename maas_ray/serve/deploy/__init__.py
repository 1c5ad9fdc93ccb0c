"""Pools on a Ray cluster: what they are bound from, how they are deployed and watched, and the front before them."""
