"""One machine of a cluster: requirements, environment, processes and the record of the started cluster."""
