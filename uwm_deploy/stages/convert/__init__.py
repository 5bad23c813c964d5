"""Stage `convert`: graphs in a lower precision."""
