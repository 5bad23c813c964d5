"""Unsafe Weights Manipulation (method.md sections 2 and 3) and the safety axis (docs/safety-axis.md): pure maths."""
