"""Adversarial examples.

Each pixel moves by a tenth of the range from white to black at most. People still read the digits; the plainly trained
network does not. Training against the attack mends most of it.
"""

import matplotlib.pyplot as plt
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from fusemlp import MLP, PGD, Adam, Engine

images, digits = load_digits(return_X_y=True)
X, X_new, y, y_new = train_test_split(images / 16, digits, random_state=0)
attack = PGD(eps=0.1, steps=20, bounds=(0, 1))

plain = Engine(MLP([64, 64, 64, 10]), optimizer=Adam(0.003), batch_size=64)
plain.fit(X, y, epochs=30)
firm = Engine(MLP([64, 64, 64, 10]), optimizer=Adam(0.003), batch_size=64)
firm.fit(X, y, epochs=30, adversarial=attack)

shown, labels = X_new[:8], y_new[:8]
attacked = plain.attack(shown, labels, attack)
figure, panels = plt.subplots(2, 8, figsize=(9, 2.9), layout="constrained")
for row, pictures in zip(panels, (shown, attacked), strict=True):
    answers = plain.predict(pictures)
    for axes, picture, answer, label in zip(row, pictures, answers, labels, strict=True):
        axes.imshow(picture.reshape(8, 8), cmap="gray_r", vmin=0, vmax=1)
        axes.set(xticks=[], yticks=[])
        axes.set_title(f"reads {answer}", color="C0" if answer == label else "C1", fontsize=10)
panels[0, 0].set_ylabel("as they are")
panels[1, 0].set_ylabel("attacked")
right = [model.evaluate(model.attack(X_new, y_new, attack), y_new)["accuracy"] for model in (plain, firm)]
figure.suptitle(f"right under attack: {right[0]:.0%} trained plainly, {right[1]:.0%} trained against it", fontsize=11)
figure.savefig("attack.png")
