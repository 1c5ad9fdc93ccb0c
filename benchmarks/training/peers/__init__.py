"""What training is measured against: programs of their own, run as such."""
