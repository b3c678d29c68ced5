"""A copy of the caller's own module with the weights of a result, its sizes seen in its graph."""
