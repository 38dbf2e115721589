"""Products of gradients and bases: with operands as they are, or rounded to bf16 and summed in the math's precision.

    fp32   operands as they are, fp64 for fp64 weights; on CUDA torch's own setting of TF32 counts
    bf16   operands to the nearest bf16, their products, which are exact, summed in fp32: what a tensor core does, at
           ten times the rate of fp32 on an H100

A gradient of bf16 products has no more digits than bf16 keeps, and those that its sums over micro-batches and ranks
gain are fewer than one batch differs from the next by. A basis rounded once turns R and the step back alike. Bases are
found in fp32 either way. A CPU rounds the operands and multiplies in fp32: the same numbers, no faster.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from optim.base import is_pretended

PRODUCTS = ("fp32", "bf16")
ALIGNED = 8
"""Values of bf16 in 16 bytes, at multiples of which tensor cores want rows to begin."""


def product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a b in `dtype`, operands rounded to bf16."""
    a, b = _narrowed(a), _narrowed(b)
    if a.is_cuda and dtype is torch.float32:
        return torch.mm(a, b, out_dtype=dtype)
    return a.to(dtype) @ b.to(dtype)


def add_product_(c: Tensor, a: Tensor, b: Tensor, *, beta: float, alpha: float) -> None:
    """c <- beta c + alpha a b in place, in the precision of c, which is rounded once; operands rounded to bf16."""
    a, b = _narrowed(a), _narrowed(b)
    if c.is_cuda and is_pretended(c):
        return  # torch cannot pretend this one, which allocates nothing
    if c.is_cuda and c.dtype is torch.float32:
        torch.addmm(c, a, b, out_dtype=c.dtype, beta=beta, alpha=alpha, out=c)
    elif c.is_cuda and c.dtype is torch.bfloat16:
        with _whole_sums():
            c.addmm_(a, b, beta=beta, alpha=alpha)
    else:
        c.addmm_(a.to(c.dtype), b.to(c.dtype), beta=beta, alpha=alpha)


@contextmanager
def _whole_sums() -> Iterator[None]:
    """Sum in fp32 to the end: by default torch lets parts of a sum, if cuBLAS makes several, meet in bf16."""
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_bf16_reduced_precision_reduction
    matmul.allow_bf16_reduced_precision_reduction = False
    try:
        yield
    finally:
        matmul.allow_bf16_reduced_precision_reduction = before


def _narrowed(x: Tensor) -> Tensor:
    """In bf16, with rows that begin where tensor cores want them."""
    if x.dtype is torch.bfloat16:
        return x
    if x.is_cuda and x.stride(-1) == 1 and x.shape[-1] % ALIGNED:
        width = -(-x.shape[-1] // ALIGNED) * ALIGNED
        return x.new_empty((*x.shape[:-1], width), dtype=torch.bfloat16)[..., : x.shape[-1]].copy_(x)
    return x.to(torch.bfloat16)
