"""The nearest valid name to one that isn't."""

from collections.abc import Iterable
from difflib import get_close_matches


def nearest(asked: str, known: Iterable[str], count: int = 2) -> list[str]:
    """Return up to `count` known names close to `asked`, best first, whatever their case.

    Dotted names are also close if their last parts are: `lr` finds `optim.lr`, `train.max_length` `model.max_length`.
    """
    by_lower = {name.lower(): name for name in known}
    whole = get_close_matches(asked.lower(), by_lower, count)
    last = asked.lower().rpartition(".")[2]
    by_last: dict[str, list[str]] = {}
    for name in by_lower:
        by_last.setdefault(name.rpartition(".")[2], []).append(name)
    parts = [name for part in get_close_matches(last, by_last, count, cutoff=0.75) for name in by_last[part]]
    exact = [name for name in parts if name.endswith(f".{last}")]
    ordered = dict.fromkeys([*exact[:1], *whole, *parts] if not whole or whole[0] not in parts else [*whole, *parts])
    return [by_lower[name] for name in list(ordered)[:count]]


def hint(asked: str, known: Iterable[str], *, prefix: str = "") -> str:
    """Return `did you mean a or b? ` for the names nearest to `asked`, or nothing."""
    near = nearest(asked, known)
    return f"did you mean {' or '.join(prefix + name for name in near)}? " if near else ""
