"""Frequencies of scaled rotary positions by the papers' formulas, one pair at a time, in Python's own floats."""

import math


def plain(width: int, base: float) -> list[float]:
    return [base ** (-2 * j / width) for j in range(width // 2)]


def linear(width: int, base: float, factor: float) -> list[float]:
    """Position interpolation: Chen et al. 2023, arXiv:2306.15595."""
    return [theta / factor for theta in plain(width, base)]


def ntk(width: int, base: float, factor: float) -> list[float]:
    return plain(width, base * factor ** (width / (width - 2)))


def dynamic(width: int, base: float, factor: float, original: int, length: int) -> list[float]:
    stretch = max(factor * length / original - (factor - 1), 1.0)
    return plain(width, base * stretch ** (width / (width - 2)))


def yarn(
    width: int, base: float, factor: float, original: int, fast: float = 32, slow: float = 1, whole: bool = True
) -> list[float]:
    """Peng et al. 2023, arXiv:2309.00071, section 3.2, with the bounds as indices, as in the authors' code."""

    def index(turns: float) -> float:
        return width * math.log(original / (2 * math.pi * turns)) / (2 * math.log(base))

    low, high = index(fast), index(slow)
    if whole:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    found = []
    for j, theta in enumerate(plain(width, base)):
        ramp = min(max((j - low) / (high - low), 0.0), 1.0)
        found.append(theta * (1 - ramp) + theta / factor * ramp)
    return found


def llama3(width: int, base: float, factor: float, original: int, low: float = 1, high: float = 4) -> list[float]:
    found = []
    for theta in plain(width, base):
        wavelength = 2 * math.pi / theta
        kept = min(max((original / wavelength - low) / (high - low), 0.0), 1.0)
        found.append((1 - kept) * theta / factor + kept * theta)
    return found


def longrope(width: int, base: float, divisors: list[float]) -> list[float]:
    """Ding et al. 2024, arXiv:2402.13753, equation 3."""
    return [theta / divisor for theta, divisor in zip(plain(width, base), divisors, strict=True)]
