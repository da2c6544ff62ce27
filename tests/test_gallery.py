"""The gallery: its programs are short and show what they say, and the pictures are made of them."""

import numpy as np
import pytest
import site_gallery
from PIL import Image

LARGEST = 60_000  # bytes of a picture
NAMES = site_gallery.NAMES


def curves_of(axes):
    return [np.asarray(line.get_ydata()) for line in axes.lines]


def shares_of(axes):
    """Return the shares of right rows that the titles of panels name."""
    return [float(panel.get_title().split(": ")[1].split("%")[0]) / 100 for panel in axes]


def attack(names):
    plain, firm = names["right"]
    assert plain < 0.6 and firm > plain + 0.2
    assert np.abs(names["attacked"] - names["shown"]).max() <= 0.1 + 1e-6
    assert np.mean(names["plain"].predict(names["shown"]) == names["labels"]) == 1


def boundaries(names):
    shares = shares_of(names["panels"])
    assert shares[0] < 0.9 and shares[-1] >= 0.99


def certified(names):
    plain, plain_attacked, firm, firm_attacked = curves_of(names["axes"])
    # a proof is below any attack
    assert np.all(plain <= plain_attacked) and np.all(firm <= firm_attacked)
    # at the size that IBP trained for
    assert plain[5] < 0.05 and firm[5] > 0.6


def curves(names):
    dead, leaky = curves_of(names["left"])
    assert dead[-1] > 2.2 and leaky[-1] < 1.2
    plain, plain_training, dropped, _ = curves_of(names["right"])
    assert plain_training[-1] < 0.1 and plain[-1] > 1.5 * plain.min()
    assert dropped[-1] < 0.7 * plain[-1]


def dependence(names):
    age, bmi, pressure = (np.ptp(panel.lines[-1].get_ydata()) for panel in names["panels"])
    assert bmi > 2 * age and pressure > 2 * age


def distance(names):
    assert names["error"] < 0.01
    # the gradient of a distance has the length 1, but for the lines where another side is as near
    lengths = np.linalg.norm(names["slopes"], axis=1)
    assert 0.9 < np.median(lengths) < 1.1


def photograph(names):
    blots, waves, truth = (panel.images[0].get_array() for panel in names["panels"])
    assert np.mean((waves - truth) ** 2) < 0.5 * np.mean((blots - truth) ** 2)


def quantiles(names):
    low, median, high = (names[name] for name in ("low", "median", "high"))
    assert np.all(low <= median) and np.all(median <= high)
    width = high - low
    assert width[-30:].mean() > 3 * width[:30].mean()
    assert 0.75 < names["inside"].mean() < 0.85


def sweep(names):
    right = names["right"]
    assert right.max() > 0.95 and 0 < right[-1].argmax() < right.shape[1] - 1
    assert right[:, -1].max() < 0.2


def test_each_program_is_in_the_gallery_and_has_a_fact():
    assert {path.stem for path in site_gallery.FOLDER.glob("*.py")} == set(NAMES)
    assert {path.stem for path in site_gallery.FOLDER.glob("*.png")} == set(NAMES)
    assert all(callable(globals()[name]) for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_program_shows_what_it_says_and_its_picture_is_of_it(name, tmp_path):
    program, kept = (site_gallery.FOLDER / f"{name}{suffix}" for suffix in (".py", ".png"))
    assert len(program.read_text(encoding="utf-8").splitlines()) <= 60
    globals()[name](site_gallery.draw(name, tmp_path))
    assert kept.stat().st_size < LARGEST
    with Image.open(kept) as before, Image.open(tmp_path / kept.name) as drawn:
        assert before.info["Description"] == site_gallery.fingerprint(name), f"python ci/site_gallery.py {name}"
        assert before.size == drawn.size


def test_the_page_has_the_text_and_the_code_of_a_program():
    section = site_gallery.section("photograph")
    assert section.startswith("## A learned photograph\n\nA network")
    assert "(photograph.png)" in section and "    from fusemlp import MLP, Adam, Engine\n" in section
