"""The Python API of `import maas_ray`. Each function does the same as the command of its name."""
