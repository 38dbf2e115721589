"""Projection of a matrix gradient into a subspace, and back into the weight.

A basis is stored as (r, k): r orthonormal rows in the space of the projected side, k being its length.
    right: R = G Q^T (m, r),  W += D Q        (k = n)
    left:  R = Q G   (r, n),  W += Q^T D      (k = m)
Side and rank follow from the global shape, never from a local shard, and never from the shape of R, from which
the authors' package guesses wrongly for reverse_std with r >= m.
Bases of a sharded gradient are found from shards in which the projected side is whole (`over`): what sums over the
other side is a sum over the ranks, and what comes of it is the same on all of them. G is never gathered.
Paper: Zhao et al. 2024, arXiv:2403.03507, section 4. Left out: projection of both sides ("full").
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from optim import fused
from optim.base import piece, read
from optim.products import add_product_, product
from optim.rounding import Store
from parallel.dtensor import WHOLE, Layout

Side = Literal["left", "right"]


def side_of(shape: Sequence[int], proj_type: str) -> Side:
    """Side of an (m, n) matrix that is projected. `std` takes the smaller one, and right for a square."""
    tall = shape[0] >= shape[1]
    sides: dict[str, Side] = {
        "std": "right" if tall else "left",
        "reverse_std": "left" if tall else "right",
        "left": "left",
        "right": "right",
    }
    return sides[proj_type]


def basis_shape(shape: Sequence[int], rank: int, side: Side) -> tuple[int, int]:
    """(r, k) of the basis of an (m, n) matrix; the rank is cut to its smaller side."""
    return min(rank, *shape), shape[0] if side == "left" else shape[1]


def low_shape(shape: Sequence[int], rank: int, side: Side) -> tuple[int, int]:
    """Shape of the projected gradient and its moments."""
    r = min(rank, *shape)
    return (r, shape[1]) if side == "left" else (shape[0], r)


def project(grad: Tensor, basis: Tensor, side: Side, products: str = "fp32") -> Tensor:
    """Project (m, n) to (m, r) or (r, n), in the basis's dtype; a lower-precision gradient is widened by chunks."""
    if products == "bf16":
        return product(basis, grad, basis.dtype) if side == "left" else product(grad, basis.T, basis.dtype)
    if grad.dtype == basis.dtype:
        return basis @ grad if side == "left" else grad @ basis.T
    shape = (len(basis), grad.shape[1]) if side == "left" else (grad.shape[0], len(basis))
    low = grad.new_zeros(shape, dtype=basis.dtype)
    for rows in row_slices(grad):
        part = grad[rows].to(basis.dtype)
        if side == "left":
            low.addmm_(basis[:, rows], part)
        else:
            torch.mm(part, basis.T, out=low[rows])
    return low


def add_back_(
    weight: Tensor,
    low: Tensor,
    basis: Tensor,
    side: Side,
    *,
    beta: float,
    alpha: float,
    store: Store = Tensor.copy_,
    products: str = "fp32",
) -> None:
    """W <- beta W + alpha back(low), without a matrix of W's size beside it.

    A weight of lower precision than the basis is updated in the basis's and rounded once: by the product itself, which
    sums in fp32, where that is one of bf16 on CUDA and rounds to the nearest; else by chunks of rows.
    """
    add_ = add_product_ if products == "bf16" else Tensor.addmm_
    rounded = products == "bf16" and weight.is_cuda and weight.dtype is torch.bfloat16 and store is Tensor.copy_
    if weight.dtype == basis.dtype or rounded:
        left, right = (basis.T, low) if side == "left" else (low, basis)
        add_(weight, left, right, beta=beta, alpha=alpha)
        return
    by_kernel = fused.usable(weight) and fused.writes(store) and basis.dtype is torch.float32
    size = basis.new_full((1, 1), alpha) if by_kernel else None
    for rows in row_slices(weight):
        left, right = (basis[:, rows].T, low) if side == "left" else (low[rows], basis)
        if size is not None:
            step = product(left, right, basis.dtype) if products == "bf16" else left @ right
            fused.scaled_add_(weight[rows], step, size, beta=beta, store=store)
            continue
        wide = weight[rows].to(basis.dtype)
        add_(wide, left, right, beta=beta, alpha=alpha)
        store(weight[rows], wide)


def svd_basis(grad: Tensor, rank: int, side: Side, over: Layout = WHOLE) -> Tensor:
    """Leading singular vectors by a thin SVD, as the authors do. (r, k)

    Of a sharded gradient as `gram_basis`: in fp64 that is as exact as an SVD in fp32.
    """
    if not over.whole:
        return gram_basis(grad, rank, side, over)
    u, _, vh = torch.linalg.svd(grad, full_matrices=False)
    basis: Tensor = u[:, :rank].T if side == "left" else vh[:rank]
    return basis


def gram_basis(grad: Tensor, rank: int, side: Side, over: Layout = WHOLE) -> Tensor:
    """Leading singular vectors as eigenvectors of the smaller of G G^T and G^T G. (r, k)

    Squares are summed and decomposed in fp64. In fp32 squaring would halve the digits: a gradient that differs in its
    last bit, as it does between rank counts, would give another subspace (losses after 10 steps on 2 ranks instead of
    one differ by 1e-5 then, by 1e-7 with fp64 or an SVD). Where the larger side is wanted, the vectors found on the
    smaller side are carried over by G and orthonormalised, null ones completed.
    """
    m, n = grad.shape if over.whole else over.shape
    small: Side = side if m == n else ("left" if m < n else "right")
    if small == side:
        gram = over.sum_(_gram(grad, small))
    else:  # the sharded side has to be whole for this
        gram = over.sum_(_gram(over.move(grad, 1 if small == "left" else 0), small))
    vectors: Tensor = torch.linalg.eigh(gram).eigenvectors[:, -rank:].flip(1)  # (k, r), largest first
    vectors = vectors.to(grad.dtype)
    if small != side:
        part = vectors[over.mine]
        vectors = torch.linalg.qr(over.sum_(grad @ part if side == "left" else grad.T @ part)).Q
    return vectors.T


def _gram(grad: Tensor, side: Side) -> Tensor:
    """G G^T (left) or G^T G (right) in fp64, widening a part of G at a time."""
    tall = grad.T if side == "left" else grad
    total = grad.new_zeros((tall.shape[1], tall.shape[1]), dtype=torch.float64)
    for rows in row_slices(tall, piece(tall) // 2):
        part = tall[rows].double()
        total.addmm_(part.T, part)
    return total


METHODS: dict[str, Callable[..., Tensor]] = {"svd": svd_basis, "gram": gram_basis}
"""Ways of finding a basis, by the name in the option `refresh`."""


def find_basis(
    grad: Tensor, rank: int, side: Side, method: str, dtype: torch.dtype, *, fix_signs: bool, over: Layout = WHOLE
) -> Tensor:
    """Orthonormal basis of the leading `rank` directions of a finite, non-zero gradient. (r, k), `dtype`

    A failed or imprecise solution is done again in fp64, and then in fp64 on the CPU. `fix_signs` makes the largest
    entry of each row positive: a solver's signs are arbitrary and differ between machines.
    """
    for wide, device in ((dtype, grad.device), (torch.float64, grad.device), (torch.float64, torch.device("cpu"))):
        try:
            basis = METHODS[method](grad.to(device=device, dtype=wide), rank, side, over)
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            continue
        if read(orthonormality_error(basis), usual=0.0) <= 1e-5:
            signed = fixed_signs(basis) if fix_signs else basis
            return signed.to(device=grad.device, dtype=dtype)
    raise RuntimeError(f"no basis found by {method} for a finite gradient of shape {tuple(grad.shape)}, even in fp64")


def orthonormality_error(basis: Tensor) -> Tensor:
    """Largest entry of |Q Q^T - I|; NaN if the basis holds one."""
    products: Tensor = basis @ basis.T
    products.diagonal().sub_(1.0)
    return products.abs().amax()


def fixed_signs(basis: Tensor) -> Tensor:
    """The basis with the largest entry of each row positive."""
    largest = basis.gather(1, basis.abs().argmax(1, keepdim=True))
    return basis * torch.where(largest < 0, -1.0, 1.0).to(basis.dtype)


def row_slices(matrix: Tensor, values: int | None = None) -> Iterator[slice]:
    """Slices of whole rows, about `values` numbers each, or as many as are widened at a time."""
    rows = max((values or piece(matrix)) // max(matrix.shape[1], 1), 1)
    for start in range(0, matrix.shape[0], rows):
        yield slice(start, min(start + rows, matrix.shape[0]))
