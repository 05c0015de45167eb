"""Operators that write into the cache: append new tokens, keep some of a prompt, replace some of what is kept."""
