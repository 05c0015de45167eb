"""Looking at results. Knows lm-eval's result files only: no torch, no models."""
