"""Queue of one model version: tenants in turn, priorities and deadlines, and the rows of the next run."""
