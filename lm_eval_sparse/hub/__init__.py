"""Results on the Hub: upload, cards, and the command that reproduces them."""
