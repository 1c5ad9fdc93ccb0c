"""Deployment of pools on a Ray cluster: Serve applications, plans, rollouts, status, and the front."""
