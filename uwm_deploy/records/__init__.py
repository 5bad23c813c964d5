"""Frozen records by domain, their JSON, their digests, and how a file is written whole."""
