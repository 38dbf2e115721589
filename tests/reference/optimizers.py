"""AdamW and GaLore-AdamW in float64 numpy, written from the papers: slow, obvious, and without our helpers."""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


class Adam:
    """Moments of one array. `direction` is N = (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)."""

    def __init__(self, shape: tuple[int, ...], betas: tuple[float, float], eps: float) -> None:
        self.m, self.v, self.t = np.zeros(shape), np.zeros(shape), 0
        self.betas, self.eps = betas, eps

    def direction(self, gradient: Array) -> Array:
        b1, b2 = self.betas
        self.t += 1
        self.m = b1 * self.m + (1 - b1) * gradient
        self.v = b2 * self.v + (1 - b2) * gradient**2
        return (self.m / (1 - b1**self.t)) / (np.sqrt(self.v / (1 - b2**self.t)) + self.eps)


def adamw(
    weight: Array, gradients: list[Array], *, lr: float, betas: tuple[float, float], eps: float, weight_decay: float
) -> Array:
    adam = Adam(weight.shape, betas, eps)
    for gradient in gradients:
        weight = weight - lr * weight_decay * weight
        weight = weight - lr * adam.direction(gradient)
    return weight


def leading_left_vectors(matrix: Array, rank: int) -> Array:
    """(m, r), each column with its largest entry positive."""
    u = np.linalg.svd(matrix, full_matrices=False)[0][:, :rank]
    for column in range(u.shape[1]):
        if u[np.argmax(np.abs(u[:, column])), column] < 0:
            u[:, column] *= -1
    return u


def galore(
    weight: Array,
    gradients: list[Array],
    *,
    left: bool,
    rank: int,
    gap: int,
    scale: float,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> Array:
    """Left projection; the right one is the same on transposed matrices."""
    if not left:
        turned = galore(
            weight.T,
            [g.T for g in gradients],
            left=True,
            rank=rank,
            gap=gap,
            scale=scale,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
        )
        return turned.T
    rank = min(rank, *weight.shape)
    adam = Adam((rank, weight.shape[1]), betas, eps)
    for count, gradient in enumerate(gradients):
        if count % gap == 0:
            basis = leading_left_vectors(gradient, rank)
        step = basis @ adam.direction(basis.T @ gradient)
        weight = weight - lr * weight_decay * weight - lr * scale * step
    return weight
