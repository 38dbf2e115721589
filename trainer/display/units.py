"""Numbers as people read them: counts, durations, figures that may be missing. ASCII only; bytes: trainer.memory."""

import math


def three_digits(value: float) -> str:
    """Write a value with about three digits: `1.23`, `12.3`, `123`, `1023`."""
    size = abs(value)
    # The borders are where rounding would add a digit: 9.996 is 10.0, not 10.00.
    return f"{value:.2f}" if size < 9.995 else f"{value:.1f}" if size < 99.95 else f"{value:.0f}"


def count_text(count: float) -> str:
    """Write a count with a decimal suffix: `3.42M`, `512`."""
    for suffix, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if abs(count) >= size:
            return three_digits(count / size) + suffix
    return f"{count:.0f}"


def duration_text(seconds: float | None) -> str:
    """Write seconds as `0:48`, `12:05`, `1:02:03` or `3d 04:05`; `-` where nobody knows."""
    if seconds is None or not math.isfinite(seconds):
        return "-"
    whole = max(0, round(seconds))
    if whole >= 86400:
        return f"{whole // 86400}d {whole % 86400 // 3600:02d}:{whole % 3600 // 60:02d}"
    if whole >= 3600:
        return f"{whole // 3600}:{whole % 3600 // 60:02d}:{whole % 60:02d}"
    return f"{whole // 60}:{whole % 60:02d}"


def number_text(value: float | None, form: str) -> str:
    """Format a number that may be missing (`-`) or not finite (`nan`, `inf`)."""
    if value is None:
        return "-"
    return format(value, form) if math.isfinite(value) else str(value)


def perplexity_text(value: float | None) -> str:
    """Write a perplexity with two decimals while they mean something."""
    return number_text(value, ".2f" if value is not None and value < 1000 else ".3g")
