"""What processes have that are forked from the one that imports this (tests/test_ranks.py)."""

import rank

for model in (rank.llama, rank.twice):
    rank.captured(model)
