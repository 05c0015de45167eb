"""Attention operators: a readable torch reference beside fast backends, one folder or file per operator.

Knows torch (and, later, Triton) only: nothing here imports transformers, lm-eval or the methods.
"""
