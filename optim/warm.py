"""Bases by a few products with the gradient: warm-started power iteration, and randomized sketches.

    warm:    Q <- orth(Q G^T G)       (right; Q G G^T for left): one pass from the last basis
    sketch:  V <- orth([Q_old; Omega]), two such passes, then the r leading directions of G within V
Orthonormalisation is Cholesky QR: products and a small factorisation, repeated until it is good (CholeskyQR2 where
twice is enough), where Householder's QR is ten times slower. Like any QR it leaves the first row's direction alone and
takes it out of the second, and so on: repeated, it turns an ordered basis into the ordered singular vectors, and a row
stays near the row it was, so that moments kept across a refresh keep their meaning.
Papers: Halko, Martinsson, Tropp 2011, arXiv:0909.4061; Yamamoto et al. 2015, doi:10.1553/etna_vol44s306 (CholeskyQR2).
"""

import torch
from torch import Tensor

from optim.base import read
from optim.projection import Side, fixed_signs, project, row_slices
from optim.rounding import keyed_normal
from parallel.dtensor import WHOLE, Layout

OVERSAMPLE = 64
"""Directions sketched beyond the rank; with PASSES they give 0.99 of the optimal energy on a slow i^-0.5 spectrum."""
PASSES = 2
EXCHANGED = 128
"""Of the rows of an old basis, those that new directions may take the place of in a search; more than are new."""
MOST_PASSES = 4
"""Of Cholesky; one is enough for rows that are nearly orthogonal, as those of a warm basis are."""
ORTHONORMAL = 1e-12
"""Largest entry of |Q Q^T - I| that is accepted."""
LEFT_OVER = 0.03
"""Share of each row that those before it must leave for one pass in fp64 to be enough for fp32: the error is about
1e-16 (r / share)^2, 2e-9 for r = 128."""


def warm_basis(grad: Tensor, old: Tensor, side: Side, over: Layout = WHOLE, *, in_range: bool = False) -> Tensor:
    """One pass of power iteration from `old` (r, k), in its dtype. `over`: see `projection.py`, as below.

    `in_range` says that squares of the gradient are known to be in the range of floats.
    """
    return orthonormal_rows(_pass(grad, old, side, over, in_range=in_range))


def sketch_basis(
    grad: Tensor, rank: int, side: Side, wide: torch.dtype, key: tuple[str, int], old: Tensor | None,
    over: Layout = WHOLE,
) -> Tensor:  # fmt: skip
    """Leading directions found from random ones, keyed by (name, number), and those of `old`. (r, k)

    Rows of `old` but the weakest stay near what they were, and so do the moments along them keep their meaning.
    """
    m, n = grad.shape if over.whole else over.shape
    k = m if side == "left" else n
    size = min(rank + OVERSAMPLE, m, n)
    count = size if old is None else max(size - rank, 0)
    found = keyed_normal((count, k), grad.new_empty((), dtype=wide), *key)
    if old is not None:
        found = torch.cat([old, found])
    for _ in range(PASSES):
        found = orthonormal_rows(_pass(grad, found, side, over))
    low = project(grad, found, side)
    low = (low if side == "left" else low.T).double()
    low /= over.norms(low)[0].clamp(min=torch.finfo(low.dtype).tiny)
    if old is not None and rank > EXCHANGED:
        return _exchanged(found, low, rank, over)
    vectors: Tensor = torch.linalg.eigh(over.sum_(low @ low.T)).eigenvectors[:, -rank:].flip(1)
    return fixed_signs(orthonormal_rows(vectors.T.to(wide) @ found))


def _exchanged(found: Tensor, low: Tensor, rank: int, over: Layout) -> Tensor:
    """The first `rank` of some orthonormal rows, with the leading directions within its weakest and all others in place
    of those weakest: an eigendecomposition of a few hundred rows instead of all. `low` is G projected by `found`."""
    energies = over.sum_(low.square().sum(1))[:rank]
    # What is but rounding is all alike, in the order of its rows: no sum over ranks may decide between them.
    energies = torch.where(energies > 1e-12 * energies.amax(), energies, 0.0)
    weakest = energies.argsort(stable=True)[:EXCHANGED].sort().values
    pool = torch.cat([weakest, torch.arange(rank, len(found), device=found.device)])
    few = low[pool]
    vectors: Tensor = torch.linalg.eigh(over.sum_(few @ few.T)).eigenvectors[:, -EXCHANGED:].flip(1)
    new = found[:rank].clone()
    new[weakest] = fixed_signs((vectors.T @ found[pool].double()).to(found.dtype))
    return new


def orthonormal_rows(rows: Tensor) -> Tensor:
    """Orthonormal rows with the span of `rows` (r, k), each on the positive side of the row it came from.

    Where rows depend on each other, as for a gradient of low rank, the missing directions are completed.
    """
    # In fp64, as products of rows far from orthogonal lose digits: the last bit of a gradient, which differs between
    # rank counts, must not show in the basis. These products are small.
    found: Tensor = rows.double()
    if rows.dtype is not torch.float64:
        once = _orthonormal_at_once(found)
        if once is not None:
            return once.to(rows.dtype)
    for attempt in range(MOST_PASSES):
        # Unit rows first: what makes the product ill-conditioned is mostly their lengths, spread as squares are.
        found = torch.nn.functional.normalize(found, dim=1, eps=torch.finfo(found.dtype).tiny)
        products = found @ found.T
        if attempt:
            error = (products - torch.eye(len(found), dtype=torch.float64, device=found.device)).abs().amax()
            if read(error, usual=0.0) <= ORTHONORMAL:
                return found.to(rows.dtype)
        factor, _ = torch.linalg.cholesky_ex(products)
        found = _inverse(factor) @ found
    q, r = torch.linalg.qr(rows.T.double())
    signed: Tensor = q * torch.where(r.diagonal() < 0, -1.0, 1.0)
    return signed.T.to(rows.dtype)


def redrawn_rows(rows: Tensor, weak: Tensor, key: tuple[str, int]) -> Tensor:
    """Orthonormal rows (r, k) with those that are marked in `weak` (r,) drawn anew, by (name, number)."""
    strong = rows[~weak].double()
    drawn = keyed_normal((len(rows) - len(strong), rows.shape[1]), strong, *key, 1)
    for _ in range(2):  # the second takes out what rounding left
        drawn -= (drawn @ strong.T) @ strong
    found = rows.clone()
    found[weak] = torch.linalg.qr(drawn.T).Q.T.to(rows.dtype)
    return found


def _orthonormal_at_once(rows: Tensor) -> Tensor | None:
    """Orthonormal rows (r, k) by one factorisation, unless that shows that they all but depend on each other."""
    products = rows @ rows.T
    factor, failed = torch.linalg.cholesky_ex(products)
    left_over = (factor.diagonal() / products.diagonal().sqrt()).amin()
    if not read(torch.where(failed == 0, left_over, 0.0), usual=1.0) >= LEFT_OVER:
        return None
    return _inverse(factor) @ rows


def _inverse(factor: Tensor) -> Tensor:
    """Of a lower triangle: to multiply by it takes less time than to solve for as many columns as a basis has."""
    eye = torch.eye(len(factor), dtype=factor.dtype, device=factor.device)
    found: Tensor = torch.linalg.solve_triangular(factor, eye, upper=False)
    return found


def _pass(grad: Tensor, basis: Tensor, side: Side, over: Layout, *, in_range: bool = False) -> Tensor:
    """(basis G) G^T for left, (basis G^T) G for right, up to a factor that keeps it in range. (r, k)"""
    low: Tensor = project(grad, basis, side)
    if not in_range:
        low.div_(over.norms(low)[0].clamp(min=torch.finfo(low.dtype).tiny))
    if grad.dtype == low.dtype:
        return over.sum_(low @ grad.T if side == "left" else low.T @ grad)
    out = torch.zeros_like(basis)
    for rows in row_slices(grad):
        part = grad[rows].to(low.dtype)
        if side == "left":
            torch.mm(low, part.T, out=out[:, rows])
        else:
            out.addmm_(low[rows].T, part)
    return over.sum_(out)
