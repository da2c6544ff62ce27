"""Quantiles.

One network learns three quantiles of a noisy curve. Eight of ten rows lie in the band. The noise grows from left to
right, and the band widens with it. The quantiles never cross, because the network learns the distance from each to the
next.
"""

import matplotlib.pyplot as plt
import numpy as np

from fusemlp import MLP, Adam, Engine

generator = np.random.default_rng(0)
x = np.sort(generator.uniform(0, 1, 1500))
y = np.sin(7 * x) + (0.05 + 0.5 * x) * generator.normal(size=1500)

engine = Engine(MLP([1, 64, 64, 3], activation="silu"), loss="quantiles", optimizer=Adam(0.003))
engine.fit(4 * x[:, None] - 2, y, epochs=150)

line = np.linspace(0, 1, 300)
low, median, high = engine.predict(4 * line[:, None] - 2).T
inside = (np.interp(x, line, low) <= y) & (y <= np.interp(x, line, high))
figure, axes = plt.subplots(figsize=(8, 3.6), layout="constrained")
axes.plot(x, y, ".", color="C4", markersize=2.5, label="1,500 rows")
axes.fill_between(
    line, low, high, color="C0", alpha=0.35, linewidth=0, label=f"10 % to 90 %: {inside.mean():.0%} of them"
)
axes.plot(line, median, color="C1", label="median")
axes.set(xlabel="x", ylabel="y", ylim=(-2.6, 2.6))
axes.legend(loc="upper right")
figure.savefig("quantiles.png")
