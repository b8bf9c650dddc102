"""Which seeds request i shows: a pure function of the run's seed and i, equal on every machine.

Chance comes from SHA-256 of (seed, purpose, numbers), so no generator's state or version matters.

    permuted   consecutive triples of seeded permutations: every seed equally often, and no triple
               twice; ends when every triple was used
    uniform    each request draws three seeds by itself, as BioInstruct did
"""

import hashlib
import math
from collections.abc import Iterator

SHOWN = 3  # seeds in a request
KINDS = ("uniform", "permuted")

Triple = tuple[int, int, int]


def number(*parts: object) -> int:
    """Return 64 bits of chance that belong to the parts."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])


def draws(kind: str, seed: int, num_seeds: int) -> Iterator[Triple]:
    """Yield the seeds' numbers of request 0, 1, 2, ...

    Args:
        kind: one of KINDS.
        seed: of the run.
        num_seeds: how many there are, >= 3.
    """
    assert kind in KINDS and num_seeds >= SHOWN
    return _permuted(seed, num_seeds) if kind == "permuted" else _uniform(seed, num_seeds)


def _order(num_seeds: int, *parts: object) -> list[int]:
    return sorted(range(num_seeds), key=lambda i: number(*parts, i))


def _uniform(seed: int, num_seeds: int) -> Iterator[Triple]:
    request = 0
    while True:
        a, b, c = _order(num_seeds, seed, "uniform", request)[:SHOWN]
        yield a, b, c
        request += 1


def _permuted(seed: int, num_seeds: int) -> Iterator[Triple]:
    used: set[Triple] = set()
    left, permutation = math.comb(num_seeds, SHOWN), 0
    while left:
        order = _order(num_seeds, seed, "permuted", permutation)
        permutation += 1
        for start in range(0, num_seeds - SHOWN + 1, SHOWN):
            a, b, c = order[start : start + SHOWN]
            low, middle, high = sorted((a, b, c))
            if (low, middle, high) not in used:
                used.add((low, middle, high))
                left -= 1
                yield a, b, c
