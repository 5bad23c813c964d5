"""Unsafe Weights Manipulation (method.md sections 2 and 3) and the axis (docs/background/safety-axis.md): pure maths."""
