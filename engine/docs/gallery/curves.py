"""Learning curves.

Two troubles, each beside its remedy. On the left relu dies at a high learning rate: most hidden units give zero for
every image, and the loss stays where it is; leaky_relu goes on learning. On the right a fifth of the labels are random.
Without dropout the network learns them by heart: the loss of the training images (dotted) goes to zero, and that of new
images rises. Dropout holds it down.
"""

import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from fusemlp import MLP, SGD, Adam, Engine

images, digits = load_digits(return_X_y=True)
X, X_new, y, y_new = train_test_split(images / 16, digits, random_state=0)

figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.4), layout="constrained")
for activation in ("relu", "leaky_relu"):
    engine = Engine(MLP([64, 32, 32, 10], activation=activation), optimizer=SGD(0.6, momentum=0.9), batch_size=32)
    history = engine.fit(X, y, epochs=40).history
    left.plot(range(1, 41), history["loss"], label=activation)
left.set(title="learning rate 0.6: loss of the training images", xlabel="epoch", ylabel="cross-entropy", ylim=0)

few, noisy = X[:600], y[:600].copy()
noisy[::5] = np.random.default_rng(0).integers(0, 10, 120)
for dropout in (0.0, 0.5):
    engine = Engine(MLP([64, 128, 128, 10], dropout=dropout), optimizer=Adam(0.003), batch_size=32)
    history = engine.fit(few, noisy, epochs=120, validation_data=(X_new, y_new)).history
    (line,) = right.plot(range(1, 121), history["val_loss"], label=f"dropout {dropout:g}: new images")
    right.plot(
        range(1, 121), history["loss"], ":", color=line.get_color(), label=f"dropout {dropout:g}: training images"
    )
right.set(title="600 training images, a fifth with random labels", xlabel="epoch", ylim=(0, 2.5))
for axes in (left, right):
    axes.grid(True)
    axes.legend()
figure.savefig("curves.png")
