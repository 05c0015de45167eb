"""What runs inside a model: the registered attention, the cache, and the counting. Knows methods and transformers."""
