"""A run's worker group on Ray Train: its trainer, controller, policies and worker group, each derived from one of Ray's."""
