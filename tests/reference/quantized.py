"""Q-GaLore in float64 numpy, written from the paper: a step of the weight in full precision, before it is rounded."""

import numpy as np
from numpy.typing import NDArray

from tests.reference.codecs import nearest

Array = NDArray[np.float64]


def affine4(matrix: Array, group: int) -> Array:
    """Each group of a row rounded to 16 levels that include 0; scale and zero-point kept in fp16."""
    out = np.empty_like(matrix)
    for row in range(matrix.shape[0]):
        for start in range(0, matrix.shape[1], group):
            part = matrix[row, start : start + group]
            low, high = min(part.min(), 0.0), max(part.max(), 0.0)
            scale = float(np.float16(max((high - low) / 15, 2.0**-24)))
            zero = np.clip(np.round(-low / scale), 0, 15)
            out[row, start : start + group] = (np.clip(np.round(part / scale) + zero, 0, 15) - zero) * scale
    return out


def dynamic8(matrix: Array, book: Array, block: int) -> Array:
    out = np.empty_like(matrix)
    for row in range(matrix.shape[0]):
        for start in range(0, matrix.shape[1], block):
            out[row, start : start + block] = nearest(matrix[row, start : start + block], book)
    return out


class QGaLore:
    """One matrix whose projected side is its columns. `books` are the signed and the unsigned code book."""

    def __init__(
        self, shape: tuple[int, int], books: tuple[Array, Array], *, rank: int, gap: int, scale: float, lr: float,
        betas: tuple[float, float], eps: float, threshold: float,
    ) -> None:  # fmt: skip
        self.m, self.v, self.t = np.zeros((shape[0], rank)), np.zeros((shape[0], rank)), 0
        self.books, self.rank, self.gap, self.scale, self.lr = books, rank, gap, scale, lr
        self.betas, self.eps, self.threshold = betas, eps, threshold
        self.due, self.refreshes = 0, 0
        self.overlaps: list[float] = []

    def stepped(self, weight: Array, gradient: Array) -> Array:
        if self.t >= self.due:
            self.refresh(gradient)
        b1, b2 = self.betas
        self.t += 1
        low = gradient @ self.basis.T
        m, v = b1 * self.m + (1 - b1) * low, b2 * self.v + (1 - b2) * low**2
        step = (m / (1 - b1**self.t)) / (np.sqrt(v / (1 - b2**self.t)) + self.eps)
        self.m, self.v = dynamic8(m, self.books[0], 256), dynamic8(v, self.books[1], 256)
        return weight - self.lr * self.scale * step @ self.basis

    def refresh(self, gradient: Array) -> None:
        basis = np.linalg.svd(gradient)[2][: self.rank]
        signs = np.sign(basis[np.arange(self.rank), np.abs(basis).argmax(1)])
        basis = basis * signs[:, None]
        if self.refreshes:
            self.overlaps.append(float(((basis @ self.basis.T) ** 2).sum()) / self.rank)
            if len(self.overlaps) >= 5 and np.mean(self.overlaps[-5:]) >= self.threshold:
                self.gap *= 2
        self.refreshes += 1
        self.due = self.t + self.gap
        self.basis = affine4(basis, 256)
