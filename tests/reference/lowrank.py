"""APOLLO, Fira, Adafactor and COSMOS in float64 numpy, written from the papers: slow, obvious, without our helpers.

All of them take a matrix whose projected side is its columns (a right projection); the left one is the transpose.
"""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


class RawAdam:
    """N = m / (sqrt(v) + eps sqrt(1 - b2^t)), without bias correction, and the correction by itself."""

    def __init__(self, shape: tuple[int, ...], betas: tuple[float, float], eps: float) -> None:
        self.m, self.v, self.t = np.zeros(shape), np.zeros(shape), 0
        self.betas, self.eps = betas, eps

    def direction(self, gradient: Array) -> Array:
        b1, b2 = self.betas
        self.t += 1
        self.m = b1 * self.m + (1 - b1) * gradient
        self.v = b2 * self.v + (1 - b2) * gradient**2
        return self.m / (np.sqrt(self.v) + self.eps * np.sqrt(1 - b2**self.t))

    @property
    def correction(self) -> float:
        b1, b2 = self.betas
        return float(np.sqrt(1 - b2**self.t) / (1 - b1**self.t))


class Limiter:
    """The norm of an update may grow by one hundredth a step."""

    def __init__(self) -> None:
        self.last: float | None = None

    def __call__(self, update: Array) -> Array:
        norm = float(np.linalg.norm(update))
        factor = 1.0 if self.last is None else max(norm / (self.last + 1e-8), 1.01) / 1.01
        self.last = norm / factor
        return update / factor


def scale_of(normed: Array, low: Array, per_channel: bool) -> Array:
    axis = 1 if per_channel else None
    return np.linalg.norm(normed, axis=axis, keepdims=True) / (np.linalg.norm(low, axis=axis, keepdims=True) + 1e-8)


def apollo(
    weight: Array, gradients: list[Array], bases: list[Array], *, per_channel: bool, scale: float, lr: float,
    betas: tuple[float, float], eps: float, weight_decay: float,
    corrected: bool = False,
) -> Array:  # fmt: skip
    """`bases[t]` is P (r, columns) of step t. `corrected`: the limiter sees Adam's bias correction (Q-APOLLO)."""
    adam, limit = RawAdam((weight.shape[0], bases[0].shape[0]), betas, eps), Limiter()
    for gradient, basis in zip(gradients, bases, strict=True):
        low = gradient @ basis.T
        direction = adam.direction(low)
        before, after = (adam.correction, 1.0) if corrected else (1.0, adam.correction)
        update = limit(gradient * before * scale_of(direction, low, per_channel))
        weight = weight - lr * weight_decay * weight - lr * after * np.sqrt(scale) * update
    return weight


def fira(
    weight: Array, gradients: list[Array], bases: list[Array], *, scale: float, lr: float,
    betas: tuple[float, float], eps: float, weight_decay: float,
) -> Array:  # fmt: skip
    adam, limit = RawAdam((weight.shape[0], bases[0].shape[0]), betas, eps), Limiter()
    for gradient, basis in zip(gradients, bases, strict=True):
        low = gradient @ basis.T
        normed = adam.direction(low)
        rest = limit((gradient - scale * low @ basis) * scale_of(normed, low, True))
        update = scale * normed @ basis + rest
        weight = weight - lr * weight_decay * weight - lr * adam.correction * update
    return weight


def adafactor(
    weight: Array, gradients: list[Array], *, lr: float, beta1: float, decay_rate: float, clip: float,
    weight_decay: float,
) -> Array:  # fmt: skip
    """Of a matrix."""
    rows, columns = np.zeros((weight.shape[0], 1)), np.zeros((1, weight.shape[1]))
    momentum = np.zeros_like(weight)
    for t, gradient in enumerate(gradients, 1):
        b2 = 1 - t**-decay_rate
        squares = gradient**2 + 1e-30
        rows = b2 * rows + (1 - b2) * squares.mean(1, keepdims=True)
        columns = b2 * columns + (1 - b2) * squares.mean(0, keepdims=True)
        update = gradient / np.sqrt(rows @ columns / rows.mean())
        update = lr * update / max(1.0, np.sqrt((update**2).mean()) / clip)
        momentum = beta1 * momentum + (1 - beta1) * update
        weight = weight - lr * weight_decay * weight - momentum
    return weight


def cosmos(
    weight: Array, gradients: list[Array], *, rank: int, gamma: float, ratio: float, lr: float,
    betas: tuple[float, float], eps: float, weight_decay: float,
) -> Array:  # fmt: skip
    """Of a matrix with at least as many rows as columns."""
    b1, b2 = betas
    m, n = weight.shape
    momentum, v = np.zeros((m, n)), np.zeros((m, rank))
    for t, g in enumerate(gradients, 1):
        momentum = b1 * momentum + g
        if t == 1:
            u = np.linalg.svd(g)[2][:rank].T
            s = (1 - b2) * (u.T @ g.T @ g @ u)
        else:
            old = u
            u = np.linalg.qr(b2 * old @ s + (1 - b2) * g.T @ (g @ old))[0]
            k = old.T @ u
            s = b2 * k.T @ s @ k + (1 - b2) * (g @ u).T @ (g @ u)
        v = b2 * v + (1 - b2) * (g @ u) ** 2
        nesterov = (g + b1 * momentum) / (1 + b1 * (1 - b1**t) / (1 - b1))
        leading = ((nesterov @ u) / (np.sqrt(v / (1 - b2**t)) + eps)) @ u.T
        x = nesterov - nesterov @ u @ u.T
        x = x / (np.linalg.norm(x) + eps)
        for _ in range(5):
            gram = x.T @ x
            x = 3.4445 * x + x @ (-4.7750 * gram + 2.0315 * gram @ gram)
        rest = np.sqrt(m * n) * x / (np.linalg.norm(x) + eps)
        update = leading + gamma * rest
        update = np.sqrt(m * n) * update / (np.linalg.norm(update) + eps)
        weight = weight - lr * weight_decay * weight - lr * ratio * update
    return weight
