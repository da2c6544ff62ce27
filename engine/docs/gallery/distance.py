"""The distance to a shape.

A signed distance is negative inside a shape, zero on its line and positive outside. A network of 3 000 numbers learns
that of a star from 20 000 points, and its line of zero follows the true one. `input_gradient` gives the direction away
from the shape, which has the length 1 where the distance is smooth.
"""

import matplotlib.pyplot as plt
import numpy as np
from numpy.typing import NDArray

from fusemlp import MLP, Adam, Engine, Frequency

angles = np.pi / 2 + np.arange(10) * np.pi / 5
corners = np.where(np.arange(10) % 2, 0.35, 0.8)[:, None] * np.column_stack([np.cos(angles), np.sin(angles)])
ends = np.roll(corners, -1, axis=0)


def distance(points: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the signed distance (n,) of points (n, 2) from the star."""
    along = ends - corners
    off = points[:, None] - corners
    nearest = np.clip((off * along).sum(2) / (along**2).sum(1), 0, 1)[..., None]
    away = np.linalg.norm(off - nearest * along, axis=2).min(1)
    # a ray to the right crosses the line an odd number of times from inside
    height = points[:, None, 1]
    crosses = (corners[:, 1] > height) != (ends[:, 1] > height)
    right = corners[:, 0] + (height - corners[:, 1]) / along[:, 1] * along[:, 0] > points[:, None, 0]
    return np.asarray(np.where((crosses & right).sum(1) % 2, -away, away))


points = np.random.default_rng(0).uniform(-1, 1, (20_000, 2))
net = MLP([2, 48, 48, 1], activation="silu", encoding=Frequency(3, inputs=True))
engine = Engine(net, loss="mse", optimizer=Adam(0.005), batch_size=256)
engine.fit(points, distance(points), epochs=30, verbose=1)

rows, columns = np.mgrid[-1:1:201j, -1:1:201j]
place = np.column_stack([columns.ravel(), rows.ravel()])
learned, slopes = engine.predict(place), engine.input_gradient(place, output=0)
error = np.abs(learned - distance(place)).mean()

figure, axes = plt.subplots(figsize=(4.8, 4), layout="constrained")
filled = axes.contourf(columns, rows, learned.reshape(rows.shape), 16, cmap="RdBu", vmin=-0.8, vmax=0.8)
figure.colorbar(filled, label="learned distance")
axes.contour(columns, rows, learned.reshape(rows.shape), [0], colors="black")
axes.plot(*np.vstack([corners, corners[:1]]).T, "--", color="gold", label="the star")
axes.set(title=f"off by {error:.4f} on average", aspect="equal")
axes.legend(loc="upper right", labelcolor="black")
figure.savefig("distance.png")
