"""Runs bundles without torch: the same session that verify measures is the one that serves."""
