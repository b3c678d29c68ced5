"""What knows nothing of pruning: torch's and transformers' private names, files, devices, threads."""
