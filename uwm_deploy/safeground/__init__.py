"""SafeGround: the safety metrics and their statistics (method.md section 5)."""
