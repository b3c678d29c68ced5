"""Weights whose values lie in files: a model larger than the memory is pruned as any other is."""
