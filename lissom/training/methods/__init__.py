"""Methods: changes to how a model is trained, one file each."""
