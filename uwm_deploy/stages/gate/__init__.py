"""Stage `gate`: measured numbers against a policy."""
