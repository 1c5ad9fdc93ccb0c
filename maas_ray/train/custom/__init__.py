"""Parts of users, named by import path: importing them, losses, metrics, and their checks before the first step."""
