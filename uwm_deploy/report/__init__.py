"""Pages and files for people and CI, rendered from the JSON reports only."""
