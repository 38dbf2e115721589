"""State codecs in float64 numpy, one block at a time, written from the papers."""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def nearest(block: Array, values: Array) -> Array:
    """The code book's nearest value to each number, times the largest magnitude."""
    largest = np.abs(block).max()
    if largest == 0:
        return np.zeros_like(block)
    codes = np.abs(block[:, None] / largest - values[None]).argmin(1)
    return values[codes] * largest


def e4m3_values() -> Array:
    """All finite non-negative values of E4M3 (no infinity; the pattern of all ones is NaN)."""
    return np.array([m / 8 * 2.0**-6 for m in range(8)] + [(1 + m / 8) * 2.0 ** (e - 7) for e in range(1, 16)
                    for m in range(8) if (e, m) != (15, 7)])  # fmt: skip


def coat(block: Array) -> Array:
    """COAT's expansion in its own form: c = sqrt(Amax Amin), a scale, an exponent k; zeros are left out of Amin."""
    magnitudes = np.abs(block)
    if not magnitudes.any():
        return np.zeros_like(block)
    largest, smallest = magnitudes.max(), magnitudes[magnitudes > 0].min()
    k = np.floor(16 * np.log2(448.0**2 / 2) / np.log2(largest / smallest)) / 16
    c = np.sqrt(largest * smallest)
    expanded = (magnitudes / c) ** k
    scale = (largest / c) ** k / 448
    table = e4m3_values()
    codes = table[np.abs((expanded / scale)[:, None] - table[None]).argmin(1)]
    return np.sign(block) * (codes * scale) ** (1 / k) * c
