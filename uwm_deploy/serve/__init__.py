"""Serves a bundle with other servers: a model repository for Triton, and a check of what is really served."""
