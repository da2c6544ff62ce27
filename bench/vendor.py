"""The comparisons for a kernel: the vendor's matrix product alone, and the same work as a sequence of library calls.

The library depends on the backend: SciPy's BLAS and NumPy on the host, torch (cuBLAS, rocBLAS) for Triton, CuPy for
CuPy. The sequences write into preallocated arrays as far as the library allows. NumPy, CuPy and torch have the
functions used here under the same names.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np

Run = Callable[[], object]
LIBRARIES = {"numpy": "numpy", "triton": "torch", "cupy": "cupy"}


class Vendor:
    """The library of a backend."""

    def __init__(self, backend: Any, precision: str) -> None:
        self.backend = backend
        self.precision = precision
        self.library = LIBRARIES[backend.traits.name]
        self.xp = importlib.import_module(self.library)
        if self.library == "torch":
            # Compare tf32 with the vendor's tf32, and fp32 with an exact product.
            self.xp.backends.cuda.matmul.allow_tf32 = precision == "tf32"

    def matrix(self, rows: int, columns: int, dtype: str = "compute", *, seed: int = 0, scale: float = 1.0) -> Any:
        """Return a matrix of normal numbers in the engine's layout."""
        pitch = -(-columns // self.backend.traits.row_multiple) * self.backend.traits.row_multiple
        made = self.backend.view(self.backend.allocate(rows * pitch, dtype), 0, (rows, columns), pitch)
        values = np.random.default_rng(seed).standard_normal((rows, columns), dtype=np.float32)
        self.backend.copy_into(made, scale * values)
        return made

    def vector(self, size: int, dtype: str = "real", *, fill: float | None = None, seed: int = 0) -> Any:
        """Return a vector of normal numbers, or of ``fill``."""
        made = self.backend.allocate(size, dtype)
        if fill is None:
            self.backend.copy_into(made, np.random.default_rng(seed).standard_normal(size, dtype=np.float32))
        else:
            made[:] = fill
        return made

    def integers(self, values: np.ndarray[Any, Any]) -> Any:
        """Return an int64 vector."""
        made = self.backend.allocate(len(values), "int64")
        self.backend.copy_into(made, values.astype(np.int64))
        return made

    def copy(self, destination: Any, source: Any) -> None:
        """Copy one array to another."""
        if self.library == "torch":
            destination.copy_(source)
        else:
            self.xp.copyto(destination, source)

    def product(self, a: Any, b: Any, out: Any) -> Run:
        """Return a call for ``out = a @ b``; a and b may be transposed views."""
        if self.library != "numpy":
            return lambda: self.xp.matmul(a, b, out=out)
        from scipy.linalg.blas import dgemm, sgemm

        gemm = sgemm if out.dtype == np.float32 else dgemm
        # BLAS is column-major, so it computes the transpose, b.T by a.T.
        flips = [not array.flags.c_contiguous for array in (b, a)]
        first, second = (array if flip else array.T for array, flip in zip((b, a), flips, strict=True))
        return lambda: gemm(1.0, first, second, 0.0, out.T, int(flips[0]), int(flips[1]), 1)

    def linear(self, x: Any, w: Any, b: Any, y: Any) -> Run:
        """y = relu(x @ w.T + b)."""
        product, xp = self.product(x, w.T, y), self.xp

        def run() -> None:
            product()
            xp.add(y, b, out=y)
            xp.clip(y, 0, None, out=y)

        return run

    def loss_grad(self, z: Any, dz: Any, labels: Any) -> Run:
        """dz = (softmax(z) - onehot) / M, and the mean cross-entropy."""
        xp = self.xp
        places = self.integers(np.arange(len(z)))

        def run() -> Any:
            largest = xp.amax(z, axis=1, keepdims=True)
            xp.subtract(z, largest, out=dz)
            own = dz[places, labels]
            xp.exp(dz, out=dz)
            sums = xp.sum(dz, axis=1, keepdims=True)
            loss = xp.mean(xp.log(sums[:, 0]) - own)
            xp.divide(dz, sums, out=dz)
            dz[places, labels] -= 1
            xp.divide(dz, len(z), out=dz)
            return loss

        return run

    def grad_input(self, dz: Any, w: Any, y: Any, out: Any) -> Run:
        """out = (dz @ w) * (y > 0)."""
        product, xp = self.product(dz, w, out), self.xp

        def run() -> None:
            product()
            xp.multiply(out, y > 0, out=out)

        return run

    def grad_weight(self, dz: Any, x: Any, dw: Any, db: Any) -> Run:
        """dw = dz.T @ x, db = the sums over the rows of dz."""
        product, xp = self.product(dz.T, x, dw), self.xp

        def run() -> None:
            product()
            xp.sum(dz, axis=0, out=db)

        return run

    def sgd(self, p: Any, g: Any, rate: float) -> Run:
        """p -= rate * g."""
        xp = self.xp
        step = xp.zeros_like(p)

        def run() -> None:
            xp.multiply(g, rate, out=step)
            xp.subtract(p, step, out=p)

        return run

    def adam(self, p: Any, g: Any, m: Any, v: Any, rate: float) -> Run:
        """Adam's update with betas of 0.9 and 0.999 (Kingma and Ba, 2015), bias corrections inside ``rate``."""
        xp = self.xp
        work = xp.zeros_like(p)

        def run() -> None:
            xp.multiply(m, 0.9, out=m)
            xp.multiply(g, 0.1, out=work)
            xp.add(m, work, out=m)
            xp.multiply(v, 0.999, out=v)
            xp.multiply(g, g, out=work)
            xp.multiply(work, 0.001, out=work)
            xp.add(v, work, out=v)
            xp.sqrt(v, out=work)
            xp.add(work, 1e-8, out=work)
            xp.divide(m, work, out=work)
            xp.multiply(work, rate, out=work)
            xp.subtract(p, work, out=p)

        return run


def in_order(*runs: Run) -> Run:
    """Return a call that runs the given calls one after another."""

    def run() -> None:
        for one in runs:
            one()

    return run
