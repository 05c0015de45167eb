"""A method for lm-eval-sparse in a package of its own."""
