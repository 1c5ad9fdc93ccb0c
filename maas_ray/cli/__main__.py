"""`python -m maas_ray.cli`, the same as `maas-ray`."""

from maas_ray.cli import main

main()
