"""Certified accuracy.

The solid line is the share of new images that provably no attack of this size can turn. The dashed line is the accuracy
under one attack. The truth lies between the two. For plain training they are far apart; training with interval bounds
(IBP) brings them together.
"""

import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from fusemlp import IBP, MLP, PGD, Adam, Engine

images, digits = load_digits(return_X_y=True)
X, X_new, y, y_new = train_test_split(images / 16, digits, random_state=0)
sizes = np.linspace(0, 0.2, 11)

figure, axes = plt.subplots(figsize=(8, 3.6), layout="constrained")
for name, against in (("plain training", None), ("IBP", IBP(0.1, bounds=(0, 1)))):
    engine = Engine(MLP([64, 64, 64, 10]), optimizer=Adam(0.003), batch_size=64)
    engine.fit(X, y, epochs=60, adversarial=against)
    certified = [engine.certified(X_new, y_new, size, bounds=(0, 1)).mean() for size in sizes]
    attacked = [
        engine.evaluate(engine.attack(X_new, y_new, PGD(size, bounds=(0, 1))), y_new)["accuracy"] for size in sizes[1:]
    ]
    (line,) = axes.plot(sizes, certified, label=f"{name}: certified")
    axes.plot(sizes, [certified[0], *attacked], "--", color=line.get_color(), label=f"{name}: under attack")
axes.set(xlabel="largest change of a pixel, of the range from white to black", ylabel="right", ylim=(-0.02, 1.02))
axes.grid(True)
axes.legend()
figure.savefig("certified.png")
