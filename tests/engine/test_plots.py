"""The pictures of a training: complete PNG files with labels, drawn without a display."""

import io
import subprocess
import sys

import matplotlib.image
import numpy as np
import pytest

from fusemlp import ArgumentError, ArgumentTypeError, History
from fusemlp.report import plots
from fusemlp.report.diagnosis import diagnose

RISING = {
    "loss": [1.0, 0.5, 0.3, 0.2],
    "val_loss": [1.1, 0.7, 0.8, 0.9],
    "accuracy": [0.5, 0.8, 0.9, 1.0],
    "val_accuracy": [0.5, 0.7, 0.7, 0.7],
    "learning_rate": [0.1] * 4,
}


def pixels(png):
    return np.asarray(matplotlib.image.imread(io.BytesIO(png)))


def labels(figure, axes):
    return [text.get_text() for text in figure.axes[axes].get_legend().get_texts()]


def test_loss_and_accuracy_side_by_side():
    (found,) = diagnose(RISING)
    figure = plots.curves_figure(RISING, loss="cross_entropy", title="digits", best_epoch=2, overfitting=found)
    assert pixels(plots.picture(figure)).std() > 0.0
    assert [axes.get_xlabel() for axes in figure.axes] == ["epoch", "epoch"]
    assert [axes.get_ylabel() for axes in figure.axes] == ["loss (cross_entropy)", "accuracy (share of right answers)"]
    assert labels(figure, 0) == ["training", "validation", "best epoch: 2", "overfitting: gap 0.7"]
    assert labels(figure, 1) == ["training", "validation", "best epoch: 2", "overfitting: gap 0.3"]
    training, held_out, best = figure.axes[0].get_lines()
    assert np.asarray(training.get_xdata()).tolist() == [1, 2, 3, 4]
    assert np.asarray(held_out.get_ydata()).tolist() == RISING["val_loss"]
    assert np.asarray(best.get_xdata()).tolist() == [2, 2]


def test_a_better_validation_is_no_overfitting():
    history = {"loss": [1.0, 0.8, 0.6, 0.4], "val_loss": [0.5, 0.4, 0.6, 0.8]}
    history |= {"accuracy": [0.5, 0.6, 0.7, 0.8], "val_accuracy": [0.7, 0.7, 0.7, 0.6]}
    (found,) = diagnose(history)
    figure = plots.curves_figure(history, overfitting=found)
    for axes in figure.axes:
        (shaded,) = axes.collections
        assert np.concatenate([path.vertices[:, 0] for path in shaded.get_paths()]).min() == 3.0


def test_a_regression_without_validation_has_one_curve():
    figure = plots.curves_figure({"loss": [100.0, 1.0, 0.5], "learning_rate": [0.1] * 3}, loss="mse")
    (axes,) = figure.axes
    assert labels(figure, 0) == ["training"]
    assert axes.get_yscale() == "log"


@pytest.mark.parametrize("losses", [[0.5], [0.5, np.inf], [-1.0, -2.0], [0.0, 0.0]])
def test_odd_histories_can_be_drawn(losses):
    figure = plots.curves_figure({"loss": losses, "val_loss": losses}, loss="poisson", title="one", best_epoch=1)
    assert plots.picture(figure).startswith(b"\x89PNG")


def test_the_sweep_marks_the_suggested_rate():
    figure = plots.sweep_figure([1e-3, 1e-2, 1e-1], [1.0, 0.5, 4.0], 1e-2, "digits")
    assert plots.picture(figure).startswith(b"\x89PNG")
    (axes,) = figure.axes
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("learning rate", "smoothed loss")
    assert labels(figure, 0) == ["training, smoothed", "suggested: 0.01"]


def test_scores_over_what_varies():
    nan = float("nan")
    varied = [
        plots.Varied("lr", [0.001, 0.1, 0.001, 10.0, 0.1], "log"),
        plots.Varied("hidden", [0, 0, 1, 1, 0], words=("none", "8x4")),
        plots.Varied("seed", [0, 1, 2, 3, 4], ordered=False),
        plots.Varied("dropout", [0.0, 0.1, 0.2, 0.3, 0.4]),
    ]
    figure = plots.scores_figure(varied, [0.5, 0.2, 0.7, nan, 0.4], metric="val_loss", kept=[1], title="iris")
    assert [axes.get_xlabel() for axes in figure.axes] == ["lr", "hidden", "seed", "dropout"]
    assert [axes.get_xscale() for axes in figure.axes] == ["log", "linear", "linear", "linear"]
    assert [axes.get_ylabel() for axes in figure.axes] == ["val_loss", "", "", "val_loss"]
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ["model", "median", "diverged: 1", "kept"]
    rates, hidden, seeds, _ = figure.axes
    (median,) = rates.get_lines()
    np.testing.assert_allclose(median.get_xydata(), [(0.001, 0.6), (0.1, 0.3)])
    models, crosses, best = rates.collections
    np.testing.assert_allclose(models.get_offsets(), [(0.001, 0.5), (0.1, 0.2), (0.001, 0.7), (0.1, 0.4)])
    np.testing.assert_allclose(best.get_offsets(), [(0.1, 0.2)])
    # The diverged model is inside the axis, at the bad end.
    np.testing.assert_allclose(crosses.get_offsets(), [(10.0, 0.98)])
    assert rates.get_xlim()[1] > 10.0
    assert [label.get_text() for label in hidden.get_xticklabels()] == ["none", "8x4"]
    assert not seeds.get_lines()
    assert pixels(plots.picture(figure)).std() > 0.0


def test_scores_where_every_model_diverged_or_there_is_one():
    varied = [plots.Varied("lr", [0.1, 1.0], "log")]
    lost = plots.scores_figure(varied, [float("nan")] * 2, metric="val_accuracy", kept=[], title="iris")
    assert plots.picture(lost).startswith(b"\x89PNG")
    one = plots.scores_figure([plots.Varied("lr", [0], words=("0.1",))], [0.5], metric="loss", kept=[0], title="iris")
    assert plots.picture(one).startswith(b"\x89PNG")


def recorded(**options):
    history = History(**options)
    for epoch in range(4):
        history.record(3 + epoch, {name: values[epoch] for name, values in RISING.items()}, 0.1)
    return history


def test_a_history_draws_itself(tmp_path):
    figure = recorded(best_epoch=4).plot()
    assert labels(figure, 0) == ["training", "validation", "best epoch: 2"]
    assert figure.axes[0].get_ylabel() == "loss"
    recorded().plot(str(tmp_path / "curves.png"), title="digits")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_what_a_history_cannot_draw(tmp_path):
    with pytest.raises(ArgumentError, match="history: it has no epoch to draw"):
        History().plot()
    for path, error, said in (
        (tmp_path / "c.jpg", ArgumentError, r"expected a file name ending in .png, .svg, .pdf, got '.*c.jpg'"),
        (tmp_path / "nowhere" / "c.png", ArgumentError, r"there is no folder .*mkdir -p"),
        (3, ArgumentTypeError, "path: expected the path of a file, got 3"),
    ):
        with pytest.raises(error, match=said):
            recorded().plot(path)
    assert list(tmp_path.iterdir()) == []


def test_pyplot_is_not_touched(tmp_path):
    script = (
        "import sys; from fusemlp.report import plots; plots.picture(plots.curves_figure({'loss': [1.0, 0.5]})); "
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize(
    ("scores", "scale"),
    [
        ([0.1, 0.2, 0.3], "linear"),
        ([0.1, 2.0, 1.0], "log"),
        ([0.0, 3.0, 0.1, 2.0], "symlog"),
        ([-1.0, 2.0, 0.1], "linear"),
    ],
)
def test_losses_over_many_decades_can_be_told_apart(scores, scale):
    varied = [plots.Varied("lr", range(len(scores)))]
    figure = plots.scores_figure(varied, scores, metric="val_loss", kept=[0], title="")
    assert figure.axes[0].get_yscale() == scale
    plots.picture(figure)


@pytest.mark.parametrize(("metric", "sign"), [("val_loss", 1.0), ("val_accuracy", -1.0), ("val_r2", -1.0)])
def test_bad_scores_do_not_squeeze_the_others(metric, sign):
    scores = [0.1, 0.11, 0.12, 0.13, 9.0, 5000.0]
    varied = [plots.Varied("lr", [1.0, 2.0, 3.0, 4.0, 5.0, 6.0])]
    figure = plots.scores_figure(varied, [sign * score for score in scores], metric=metric, kept=[0, 1, 5], title="")
    (axes,) = figure.axes
    # three times as far from the best as the median
    low, high = sorted(sign * end for end in axes.get_ylim())
    assert 0.05 < low < 0.1 and 0.13 < high < 0.1 + 3 * 0.025
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["model", "beyond the axis: 2", "kept"]
    _, outside, kept, beyond = axes.collections
    edge = 0.98 if sign > 0 else 0.02
    np.testing.assert_allclose(outside.get_offsets(), [(5.0, edge), (6.0, edge)])
    assert len(kept.get_offsets()) == 2
    np.testing.assert_allclose(beyond.get_offsets(), [(6.0, edge)])


def test_several_models_are_faint_beside_their_mean():
    short = {name: values[:2] for name, values in RISING.items()}
    figure = plots.curves_figure(short, models=[RISING, short])
    assert labels(figure, 0) == ["training", "validation"]
    lines = figure.axes[0].get_lines()
    drawn = [(len(line.get_xdata()), line.get_alpha()) for line in lines]
    assert drawn == [(4, 0.4), (4, 0.4), (2, 0.4), (2, 0.4), (2, None), (2, None)]
    # everywhere training is dashed, and validation solid
    assert [line.get_linestyle() for line in lines] == ["--", "-"] * 3
