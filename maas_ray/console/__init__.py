"""What programs in a terminal share: output for people, interruptions, and the frame of a submitted job."""
