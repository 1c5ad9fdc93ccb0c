"""Makes `python -m maas_ray.cli` the same as `maas-ray`."""

from maas_ray.process.search_path import leave_out_working_directory

leave_out_working_directory()  # before any further import

from maas_ray.cli import main  # noqa: E402

main()
