"""Sweeps: a grid of ordinary lm-eval runs, a ledger of what is done, what runs the rest. Knows records, no torch."""
