"""For tests of methods: calls as the runtime makes them, on tensors that are there."""

from .calls import Decoding, call_of, select

__all__ = ["Decoding", "call_of", "select"]
