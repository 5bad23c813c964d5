"""Unsafe Weights Manipulation: pure tensor maths (method.md sections 2 and 3)."""
