"""A learned photograph.

A network learns the colour of each pixel from its place. From two coordinates alone it learns soft blots. From sines
and cosines of the coordinates at many frequencies (Tancik et al., 2020) it learns roofs and columns.
"""

import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_sample_image

from fusemlp import MLP, Adam, Engine

photograph = load_sample_image("china.jpg")[::4, ::4] / 255  # (107, 160, 3)
height, width, _ = photograph.shape
rows, columns = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
place = np.column_stack([rows.ravel(), columns.ravel()])
directions = np.random.default_rng(0).normal(0, 20, (2, 128))
waves = np.hstack([np.sin(place @ directions), np.cos(place @ directions)])

figure, panels = plt.subplots(1, 3, figsize=(9, 2.4), layout="constrained")
for axes, inputs, title in zip(panels[:2], (place, waves), ("from coordinates", "from waves"), strict=True):
    engine = Engine(MLP([inputs.shape[1], 128, 128, 3]), loss="mse", optimizer=Adam(0.003), batch_size=256)
    engine.fit(inputs, photograph.reshape(-1, 3), epochs=40)
    axes.imshow(engine.predict(inputs).reshape(photograph.shape).clip(0, 1))
    axes.set_title(title)
panels[2].imshow(photograph)
panels[2].set_title("photograph")
for axes in panels:
    axes.set_axis_off()
figure.savefig("photograph.png")
