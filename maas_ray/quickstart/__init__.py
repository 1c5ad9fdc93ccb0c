"""The whole path on one machine, from data to predictions over HTTP: `maas-ray quickstart`."""
