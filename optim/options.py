"""What the groups of an optimizer may say: options of all, options of those that project, and which fit together."""

import math
from collections.abc import Sequence
from typing import Any

from optim.base import Group
from optim.products import PRODUCTS
from optim.projection import METHODS
from optim.rules import Rule
from optim.subspace import BASIS

PROJ_TYPES = ("std", "reverse_std", "left", "right")
REFRESH = (*METHODS, "warm", "randomized", "random")
ON_REFRESH = ("keep", "sign", "procrustes", "rotate", "reset")
ROUNDING = ("nearest", "stochastic")
COMPAT = ("torch", "authors")
DEFAULTS: dict[str, Any] = {"states": "fp32", "rounding": "nearest"}
"""Options that every optimizer takes."""
SUBSPACE_DEFAULTS: dict[str, Any] = {
    "rank": None,
    "update_proj_gap": 200,
    "scale": 0.25,
    "proj_type": "std",
    "refresh": "warm",
    "on_refresh": "keep",
    "basis": "fp32",
    "basis_copies": False,
    "products": "fp32",
    "stagger": False,
    "lazy": False,
    "lazy_threshold": 0.4,
    "compat": "torch",
}
"""Options of those that project:

rank: rank of the subspace; a group without one is not projected.
update_proj_gap: steps between two refreshes of the basis.
scale: factor on the projected step; it does not touch the weight decay.
proj_type: side that is projected, "std", "reverse_std", "left" or "right".
refresh: how a basis is found: "warm" (eigendecomposition first, warm-started power iteration from then on), "svd",
    "gram", "randomized" or, for APOLLO, "random".
on_refresh: what becomes of the moments: "keep"; "sign" and "procrustes" turn the new basis to the old one, "rotate"
    turns the moments to the new basis, "reset" begins them anew.
basis: "fp32"; "int4" to keep the basis in half a byte a value; "regenerate", for APOLLO's random one, to draw it again
    at each step and keep none.
basis_copies: of a sharded matrix, keep the whole basis on every rank rather than gather it for each step.
products: operands of the products with a basis, but for those that find it: "fp32" as they are, "bf16" rounded.
stagger: spread the refreshes of different matrices over the gap, by their names.
lazy: double a matrix's gap while the last five overlaps of its subspaces average `lazy_threshold`.
compat: "torch", or "authors" for the numerics of the method's own package.
"""


def check_subspace(group: Group, lift: str, rule: Rule) -> None:
    """Raise ValueError if a group's options of projection make no sense, alone or together."""
    for key, known in (
        ("proj_type", PROJ_TYPES),
        ("refresh", REFRESH),
        ("on_refresh", ON_REFRESH),
        ("basis", tuple(BASIS)),
        ("products", PRODUCTS),
    ):
        if group[key] not in known:
            raise ValueError(f"{key}={group[key]!r}: must be one of {', '.join(known)}")
    for key in ("rank", "update_proj_gap"):
        if not isinstance(group[key], int) or group[key] < 1:
            raise ValueError(f"{key}={group[key]!r}: must be a whole number of at least 1")
    if not 0 < group["scale"] < math.inf:
        raise ValueError(f"scale={group['scale']}: must be a finite number above 0; 0.25 is usual")
    if group["refresh"] == "random":
        if lift not in ("channel", "tensor"):
            raise ValueError(
                "refresh='random': a random basis only measures gradients; turning a step back needs an orthonormal "
                "one. Use refresh='warm', or APOLLO."
            )
        if group["on_refresh"] not in ("keep", "reset"):
            raise ValueError(
                f"on_refresh={group['on_refresh']!r} with refresh='random': a new random basis has nothing to do with "
                "the old one; use 'keep' or 'reset'"
            )
        if group["lazy"]:
            raise ValueError("lazy=True with refresh='random': random bases do not settle; use lazy=False")
    if group["basis"] == "regenerate":
        if group["refresh"] != "random" or group["compat"] == "authors":
            raise ValueError(
                "basis='regenerate': only a random basis can be drawn again (APOLLO with refresh='random' and "
                "compat='torch'); use basis='fp32'"
            )
        if group["basis_copies"]:
            raise ValueError("basis_copies=True with basis='regenerate': there is no basis to copy; leave one out")
    if group["on_refresh"] == "rotate" and not rule.turns:
        raise ValueError(
            f"on_refresh='rotate': the factored moments of {type(rule).__name__} cannot be turned; use 'keep', 'sign', "
            "'procrustes' or 'reset'"
        )


def require_known(group: Group, key: str, known: Sequence[str]) -> None:
    """Raise ValueError if an option is none of those known."""
    if group[key] not in known:
        raise ValueError(f"{key}={group[key]!r}: must be one of {', '.join(known)}")
