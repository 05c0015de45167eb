"""Files of results: reading them, and the one way to write a file."""
