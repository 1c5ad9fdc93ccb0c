"""The health of a cluster: doctor, status, clocks and fronts."""
