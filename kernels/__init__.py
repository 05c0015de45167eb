"""Operators of sparse attention: estimate, decide where a budget ends, list what is read, attend, and keep the cache.

A readable torch reference beside fast backends, one folder per operator. Knows torch and Triton only: nothing here
imports transformers, lm-eval or the methods. See README.md.
"""
