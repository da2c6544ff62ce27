"""Five quantiles of a noisy curve, from one network.

The noise grows from left to right, and the bands widen with it. They never cross, because the network learns the
distance from each quantile to the next.
"""

import matplotlib.pyplot as plt
import numpy as np
from fusemlp.losses import Quantiles

from fusemlp import MLP, Adam, Engine

generator = np.random.default_rng(0)
x = np.sort(generator.uniform(0, 1, 1500))
y = np.sin(7 * x) + (0.05 + 0.5 * x) * generator.normal(size=1500)

engine = Engine(
    MLP([1, 64, 64, 5], activation="silu"), loss=Quantiles([0.05, 0.25, 0.5, 0.75, 0.95]), optimizer=Adam(0.003)
)
engine.fit(4 * x[:, None] - 2, y, epochs=150)

line = np.linspace(0, 1, 300)
q5, q25, q50, q75, q95 = engine.predict(4 * line[:, None] - 2).T
inside = np.interp(x, line, q5) <= y
inside &= y <= np.interp(x, line, q95)
figure, axes = plt.subplots(figsize=(8, 3.6), layout="constrained")
axes.plot(x, y, ".", color="C4", markersize=2.5, label="1,500 rows")
axes.fill_between(
    line, q5, q95, color="C0", alpha=0.25, linewidth=0, label=f"5 % to 95 % ({inside.mean():.0%} of the rows)"
)
axes.fill_between(line, q25, q75, color="C0", alpha=0.45, linewidth=0, label="25 % to 75 %")
axes.plot(line, q50, color="C1", label="median")
axes.set(xlabel="x", ylabel="y", ylim=(-2.6, 2.6))
axes.legend(loc="upper right")
figure.savefig("quantiles.png")
