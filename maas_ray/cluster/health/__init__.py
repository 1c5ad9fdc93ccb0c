"""Looking at a cluster: doctor, status, clocks, and the address where it answers predictions."""
