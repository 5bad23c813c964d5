"""Sources of quadruples and of zero-shot items."""
