"""Outputs for people and for CI systems, rendered from the records of a verdict only."""
