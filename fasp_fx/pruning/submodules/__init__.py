"""Models that cannot be captured whole, pruned by the submodules that can."""
