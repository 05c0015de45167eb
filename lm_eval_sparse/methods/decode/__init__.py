"""Methods of the decode phase, one file each."""
