"""Random numbers that are the same each time, wherever and in whichever order they are drawn."""

from __future__ import annotations

import hashlib

import torch


def seed_of(*place: object) -> int:
    """A seed of its own for each place, of 32 bits, which is what torch takes of one.

    Args:
        place: whole numbers and names that tell it from others.
    """
    return int.from_bytes(hashlib.blake2b(repr(place).encode(), digest_size=4).digest())


def generator_of(*place: object) -> torch.Generator:
    """Random numbers of their own for each place, on the CPU; arguments as for :func:`seed_of`."""
    return torch.Generator(device="cpu").manual_seed(seed_of(*place))


__all__ = ["generator_of", "seed_of"]
