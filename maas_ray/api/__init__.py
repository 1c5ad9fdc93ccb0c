"""The Python API: what `import maas_ray` offers. Each function does what the command of its name does."""
