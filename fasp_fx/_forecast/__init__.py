"""What a pruning will take: memory, disk, floating-point operations and time, from the graph alone."""
