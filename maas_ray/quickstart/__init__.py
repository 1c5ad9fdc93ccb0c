"""The complete pipeline on one machine, from data to predictions over HTTP: `maas-ray quickstart`."""
