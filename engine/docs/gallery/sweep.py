"""A sweep.

96 networks; a cell is the mean of two seeds. The learning rates in the middle work best. Below them ten epochs are too
few, and above 1 no network learns anything. The narrower the network, the fewer rates work for it.
"""

import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from fusemlp import MLP, SGD, Fleet

images, digits = load_digits(return_X_y=True)
X, X_new, y, y_new = train_test_split(images / 16, digits, random_state=0)

rates, widths = np.geomspace(0.003, 3, 8), [4, 8, 16, 32, 64, 128]
fleet = Fleet(
    MLP([64, 8, 10]), optimizer=SGD(momentum=0.9), vary={"hidden": widths, "lr": rates.tolist(), "seed": [0, 1]}
)
results = fleet.fit(X, y, epochs=10, validation_data=(X_new, y_new))
right = np.array([member.scores.get("val_accuracy", 0.1) for member in results.members]).reshape(6, 8, 2).mean(axis=2)

figure, axes = plt.subplots(figsize=(7, 3.8), layout="constrained")
cells = axes.imshow(right, vmin=0, vmax=1, origin="lower", aspect="auto")
for (row, column), share in np.ndenumerate(right):
    axes.text(
        column, row, f"{share:.0%}", ha="center", va="center", color="black" if share > 0.5 else "white", fontsize=9
    )
axes.set_xticks(range(8), [f"{rate:.2g}" for rate in rates])
axes.set_yticks(range(6), [str(width) for width in widths])
axes.set(title="new images that are right after 10 epochs", xlabel="learning rate", ylabel="hidden units")
figure.savefig("sweep.png")
