"""maas-ray: Model as a Service on Ray. From data to a served HTTP endpoint, each step proven."""

__version__ = "0.1.0"
