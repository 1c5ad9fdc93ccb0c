"""Shared code of terminal programs: readable output, interruptions, and the main function of a submitted job."""
