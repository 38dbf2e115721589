"""Permutations that are the same on every machine, in every process and after every resume."""

from hashlib import blake2b

import numpy as np

from trainer.data.packing import Ints


def permutation(size: int, *key: int) -> Ints:
    """Return a permutation of range(size) that is a function of `size` and `key` alone.

    Sorts the raw words of a counter-based generator. numpy promises the raw stream of a bit generator for good, but
    not what Generator.permutation makes of it: an upgrade between save and resume would silently reorder the data.
    """
    digest = blake2b(repr(key).encode(), digest_size=16).digest()
    words = np.random.Philox(key=np.frombuffer(digest, "<u8")).random_raw(size)
    return np.argsort(words, kind="stable")
