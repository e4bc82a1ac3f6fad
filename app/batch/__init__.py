"""Rows in, pictures out: the batch command and its engines."""
