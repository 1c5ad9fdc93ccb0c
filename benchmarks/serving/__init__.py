"""Measures the serving path against other model servers; see __main__."""
