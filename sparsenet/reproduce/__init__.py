"""Repeats published experiments: what was run, the numbers that were published, tables and figures beside them."""
