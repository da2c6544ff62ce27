"""The set-up of all tests: the path of the oracle comparison, Triton without a GPU, pictures that no test looks at.

The oracle comparison and its tolerances live with the kernels' tests, and all tests use them.
"""

import base64
import gc
import importlib.util
import io
import os
import signal
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "kernels"))
sys.path += [str(Path(__file__).parents[1] / "ci"), str(Path(__file__).parents[1])]

# Under nohup and in background jobs Ctrl-C is ignored: by this process, and by those that it starts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# The compiled loop for all programs: the tests have more kinds of programs than are worth a compilation each.
os.environ.setdefault("FUSEMLP_WHOLE_LOOP", "1")


def interpret_triton_without_a_gpu():
    """Select Triton's interpreter before its first import, unless there is a card to compile for, and make it quick."""
    if not all(map(importlib.util.find_spec, ("torch", "triton"))):
        return
    if "TRITON_INTERPRET" not in os.environ:
        import torch

        if not torch.cuda.is_available():
            os.environ["TRITON_INTERPRET"] = "1"
    if os.environ.get("TRITON_INTERPRET") == "1":
        import quick_interpreter

        quick_interpreter.quicken()


interpret_triton_without_a_gpu()


# The modules that look at the pictures of a training, and random commands, whose numbers may be anything.
LOOKING = ("test_cli_plot", "test_page", "test_plots", "test_random_commands")
WITHOUT_PICTURES = ("distributed", "kernels", "ptx")
PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg=="
EMPTY = {"png": base64.b64decode(PIXEL), "svg": b"<?xml?><svg></svg>", "pdf": b"%PDF-1.4"}


@pytest.fixture(autouse=True, scope="module")
def rendered(request):
    """Render the figures of a training in ``LOOKING`` alone: elsewhere it would take three quarters of the time.

    The figures are made everywhere, with their lines and words.
    """
    if request.module.__name__ in LOOKING or request.path.parent.name in WITHOUT_PICTURES:
        yield
        return
    from matplotlib.figure import Figure

    savefig = Figure.savefig

    def empty(figure, target, *, format=None, **options):
        if format is None:
            # a file of the test's own
            savefig(figure, target, **options)
        else:
            target.write(EMPTY[format].decode() if isinstance(target, io.TextIOBase) else EMPTY[format])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", empty)
        yield


def pytest_collection_modifyitems(items):
    """Begin with what takes a minute: at the end the other worker would have nothing left to do."""
    items.sort(key=lambda item: item.path.name != "test_apart.py")


def pytest_collection_finish():
    """Keep the collector from searching what is there for the whole run, such as modules and test items."""
    gc.freeze()


def pytest_sessionfinish():
    gc.unfreeze()
