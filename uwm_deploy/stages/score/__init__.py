"""Stage `score`: scores of every edited layer."""
