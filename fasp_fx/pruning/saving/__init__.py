"""Results as folders."""
