"""Decision boundaries.

Four networks, trained together as one fleet. Three units in each hidden layer are enough to separate the two spirals,
with sharp corners. With 32 the boundary runs in the middle between them. With two the network cuts the plane a few
times and mixes the inner turns.
"""

import matplotlib.pyplot as plt
import numpy as np

from fusemlp import MLP, Adam, Fleet

generator = np.random.default_rng(0)
labels = np.arange(500) % 2
turn = 2.5 * np.pi * np.sqrt(generator.uniform(0.02, 1, 500))
angle = turn + np.pi * labels  # the second arm is the first one after half a turn
points = np.column_stack([np.cos(angle), np.sin(angle)]) * turn[:, None] / 3 + generator.normal(0, 0.08, (500, 2))

widths = [2, 3, 4, 32]
fleet = Fleet(
    MLP([2, 8, 8, 2], activation="silu"),
    optimizer=Adam(0.003),
    batch_size=32,
    vary={"hidden": [[n, n] for n in widths]},
)
results = fleet.fit(points, labels, epochs=300)

x, y = np.meshgrid(np.linspace(-3, 3, 150), np.linspace(-3, 3, 150))
plane = np.column_stack([x.ravel(), y.ravel()])
figure, panels = plt.subplots(1, 4, figsize=(10, 2.9), layout="constrained")
for axes, width, member in zip(panels, widths, results.members, strict=True):
    probability = member.engine.predict_proba(plane)[:, 1].reshape(x.shape)
    right = np.mean(member.engine.predict(points) == labels)
    axes.imshow(probability, origin="lower", extent=(-3, 3, -3, 3), cmap="coolwarm", vmin=-0.5, vmax=1.5)
    for label, colour in ((0, "#08306b"), (1, "#7f2704")):
        axes.plot(*points[labels == label].T, ".", color=colour, markersize=3)
    axes.set(title=f"{width} units a layer: {right:.0%} right", xticks=[], yticks=[])
figure.savefig("boundaries.png")
