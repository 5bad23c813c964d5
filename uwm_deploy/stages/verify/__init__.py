"""Stage `verify`: numbers and decisions of original, edited and every artifact."""
