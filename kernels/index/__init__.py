"""Operators that turn scores into lists: which blocks, diagonals, columns or pages are read."""
