"""Methods that drop part of the cache, one file each."""
