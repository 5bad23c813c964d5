"""Sums over a tower's pooled features, for a closed-form edit (docs/background/safety-axis.md sections 2 and 3).

They are sums, so the batch size, the order of the batches and the number of processes do not change the fit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from uwm_deploy.errors import DataError, IntegrityError

_VECTORS = ("sum_safe", "sum_unsafe")
_MATRICES = ("gram_safe", "gram_unsafe", "gram_cross")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Moments:
    """Sums over the pairs of one tower, float64. x is the input of the last linear map W (d, m), e = W x.

    Attributes:
        count: Number of pairs.
        sum_safe: (m,) float64, sum of x_s.
        sum_unsafe: (m,) float64, sum of x_u.
        gram_safe: (m, m) float64, sum of x_s x_s'.
        gram_unsafe: (m, m) float64, sum of x_u x_u'.
        gram_cross: (m, m) float64, sum of x_s x_u'.
        length_sum: Sum of ||W x_s||.
    """

    count: int
    sum_safe: np.ndarray
    sum_unsafe: np.ndarray
    gram_safe: np.ndarray
    gram_unsafe: np.ndarray
    gram_cross: np.ndarray
    length_sum: float

    def __add__(self, other: Moments) -> Moments:
        """Moments of both sets of pairs together.

        Raises:
            DataError: If the features have different sizes.
        """
        if self.size != other.size:
            raise DataError(
                f"moments of {self.size} and of {other.size} features cannot be added", fix="use one model's features"
            )
        sums = {name: getattr(self, name) + getattr(other, name) for name in (*_VECTORS, *_MATRICES)}
        return Moments(count=self.count + other.count, length_sum=self.length_sum + other.length_sum, **sums)

    @property
    def size(self) -> int:
        """Number of features, m."""
        return len(self.sum_safe)

    @property
    def mean_safe(self) -> np.ndarray:
        """Mean safe feature mu_s, (m,) float64."""
        return self.sum_safe / self.count

    @property
    def mean_unsafe(self) -> np.ndarray:
        """Mean unsafe feature mu_u, (m,) float64."""
        return self.sum_unsafe / self.count

    @property
    def mean_length(self) -> float:
        """Mean ||W x_s||, n in docs/background/safety-axis.md section 2."""
        return self.length_sum / self.count

    @property
    def covariance_safe(self) -> np.ndarray:
        """Cov(x_s), divided by n - 1, (m, m) float64."""
        result: np.ndarray = _centred(self.gram_safe, self.mean_safe, self.count) / (self.count - 1)
        return result

    @property
    def gram_difference(self) -> np.ndarray:
        """Sum of (x_s - x_u)(x_s - x_u)', (m, m) float64."""
        result: np.ndarray = self.gram_safe + self.gram_unsafe - self.gram_cross - self.gram_cross.T
        return result

    @property
    def covariance_difference(self) -> np.ndarray:
        """Cov(x_s - x_u), divided by n - 1, (m, m) float64."""
        mean = self.mean_safe - self.mean_unsafe
        result: np.ndarray = _centred(self.gram_difference, mean, self.count) / (self.count - 1)
        return result

    @property
    def mean_both(self) -> np.ndarray:
        """Mean over safe and unsafe features together, (m,) float64."""
        result: np.ndarray = (self.mean_safe + self.mean_unsafe) / 2
        return result

    @property
    def covariance_both(self) -> np.ndarray:
        """Covariance over safe and unsafe features together, divided by their number 2n, (m, m) float64."""
        return _centred(self.gram_safe + self.gram_unsafe, self.mean_both, 2 * self.count) / (2 * self.count)

    def mean_outer_products(self, weight: np.ndarray) -> np.ndarray:
        """Mean of e_s e_s' plus mean of e_u e_u'.

        Args:
            weight: (d, m) float64, W.

        Returns:
            (d, d) float64, symmetric.
        """
        product = weight @ (self.gram_safe + self.gram_unsafe) @ weight.T / self.count
        return _symmetric(product)

    def require_pairs(self, at_least: int = 2) -> None:
        """Refuses moments of too few pairs.

        Raises:
            DataError: If there are fewer.
        """
        if self.count < at_least:
            raise DataError(f"{self.count} pairs are too few for a fit", fix=f"give at least {at_least} pairs")

    def to_tensors(self, prefix: str) -> dict[str, np.ndarray]:
        """Arrays for a safetensors file.

        Args:
            prefix: Beginning of every name, e.g. the tower's.

        Returns:
            Arrays by name: the sums, (m,) and (m, m) float64; ``count``, (1,) int64; ``length_sum``, (1,) float64.
        """
        arrays = {name: np.ascontiguousarray(getattr(self, name)) for name in (*_VECTORS, *_MATRICES)}
        arrays["count"] = np.array([self.count], dtype=np.int64)
        arrays["length_sum"] = np.array([self.length_sum], dtype=np.float64)
        return {f"{prefix}.{name}": array for name, array in arrays.items()}

    @staticmethod
    def from_tensors(tensors: Mapping[str, np.ndarray], prefix: str) -> Moments:
        """Reads the arrays that `to_tensors` gave.

        Args:
            tensors: Arrays by name, (m,), (m, m) and (1,), float64 and int64, see `to_tensors`.
            prefix: Beginning of their names.

        Raises:
            IntegrityError: If an array is missing, has another shape or type, or is not finite.
        """
        size = len(_array(tensors, prefix, "sum_safe", None))
        shapes = dict.fromkeys(_VECTORS, (size,)) | dict.fromkeys(_MATRICES, (size, size))
        sums = {name: _array(tensors, prefix, name, shape) for name, shape in shapes.items()}
        count = int(_array(tensors, prefix, "count", (1,), np.int64)[0])
        return Moments(count=count, length_sum=float(_array(tensors, prefix, "length_sum", (1,))[0]), **sums)


def moments_of(safe: np.ndarray, unsafe: np.ndarray, weight: np.ndarray) -> Moments:
    """Moments of some pairs.

    Args:
        safe: (n, m), any floating dtype, x_s; row i belongs to row i of `unsafe`.
        unsafe: (n, m), any floating dtype, x_u.
        weight: (d, m), any floating dtype, W.

    Raises:
        DataError: If shapes do not fit, or a value is not finite.
    """
    _require_pairs_of_rows(safe, unsafe, weight)
    x_s, x_u, w = (part.astype(np.float64) for part in (safe, unsafe, weight))
    return Moments(
        count=len(x_s),
        sum_safe=x_s.sum(0),
        sum_unsafe=x_u.sum(0),
        gram_safe=x_s.T @ x_s,
        gram_unsafe=x_u.T @ x_u,
        gram_cross=x_s.T @ x_u,
        length_sum=float(np.linalg.norm(x_s @ w.T, axis=1).sum()),
    )


def _require_pairs_of_rows(safe: np.ndarray, unsafe: np.ndarray, weight: np.ndarray) -> None:
    if safe.ndim != 2 or safe.shape != unsafe.shape or weight.ndim != 2 or weight.shape[1] != safe.shape[1]:
        raise DataError(
            f"features of shapes {safe.shape} and {unsafe.shape} do not fit a weight of shape {weight.shape}",
            fix="give whole pairs of the inputs of this weight",
        )
    for name, rows in {"safe": safe, "unsafe": unsafe, "weight": weight}.items():
        if not np.isfinite(rows).all():
            raise DataError(f"{name} holds NaN or infinity", fix="leave such pairs out, by name, first")


def _array(
    tensors: Mapping[str, np.ndarray],
    prefix: str,
    name: str,
    shape: tuple[int, ...] | None,
    dtype: type[np.generic] = np.float64,
) -> np.ndarray:
    key = f"{prefix}.{name}"
    array = tensors.get(key)
    if array is None or array.dtype != dtype or array.ndim == 0 or (shape is not None and array.shape != shape):
        found = "missing" if array is None else f"{array.dtype} {array.shape}"
        raise IntegrityError(f"moments: {key} is {found}, not {dtype.__name__} {shape or '(m,)'}", fix="fit again")
    if not np.isfinite(array).all():
        raise IntegrityError(f"moments: {key} holds NaN or infinity", fix="fit again")
    return array


def _centred(gram: np.ndarray, mean: np.ndarray, count: int) -> np.ndarray:
    """Sum of (x - mean)(x - mean)' from the sum of x x'."""
    return _symmetric(gram - count * np.outer(mean, mean))


def _symmetric(matrix: np.ndarray) -> np.ndarray:
    """A matrix made symmetric: rounding leaves a product of three matrices slightly off, and solvers read one triangle."""
    result: np.ndarray = (matrix + matrix.T) / 2
    return result
