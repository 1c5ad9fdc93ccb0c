"""Reading files that somebody else wrote: bounded, opened once, judged by what was opened."""
