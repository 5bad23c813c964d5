"""The stages as data, the run that pulls them, and the runs that some stages are given to."""
