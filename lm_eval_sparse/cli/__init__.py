"""The command `lm-eval-sparse`."""
