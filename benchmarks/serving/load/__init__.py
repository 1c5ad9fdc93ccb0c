"""Load: closed loop (wrk, or a Python one) and open loop. All print the same figures."""
