"""Methods of the prefill phase, one file each."""
