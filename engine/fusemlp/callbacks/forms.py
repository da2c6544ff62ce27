"""The two forms of a callback, the library's own and Keras's, and how ``fit`` calls either.

Any object with some of the methods is a callback. In the library's form (``Callback``) the engine is the first
argument: ``on_epoch_end(engine, epoch, logs)``. In Keras's form it is an attribute: ``on_epoch_end(epoch, logs)``, with
the engine in ``self.model`` (set by the object's ``set_model``, if it has one). ``fit`` reads signatures beforehand.

Scalars are read from the device once an epoch. So the ``logs`` of Keras's batch methods and of ``on_epoch_begin`` are
empty, and those of ``on_train_end`` are the last epoch's. Methods of tests are not called. Ctrl-C waits for a batch.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, ClassVar

from fusemlp_kernels.errors import ArgumentTypeError

log = logging.getLogger("fusemlp.callbacks")


class Callback:
    """The base class of a callback; override the methods you need. Epochs and batches count from 0.

    Setting ``engine.stop_training`` ends the training after the batch. A callback may add numbers to ``logs``; the
    names in its attribute ``writes`` can be monitored by later callbacks.
    """

    writes: ClassVar[str | Sequence[str]] = ()

    def on_train_begin(self, engine: Any) -> None:
        """Called before the first epoch."""

    def on_epoch_begin(self, engine: Any, epoch: int) -> None:
        """Called before an epoch's first batch."""

    def on_batch_begin(self, engine: Any, batch: int) -> None:
        """Called before each batch of an epoch."""

    def on_batch_end(self, engine: Any, batch: int) -> None:
        """Called after each batch of an epoch."""

    def on_epoch_end(self, engine: Any, epoch: int, logs: dict[str, float]) -> None:
        """Called after an epoch; all in ``logs``, also numbers that you add, goes into the history and on."""

    def on_train_end(self, engine: Any, history: Any) -> None:
        """Called after the last epoch, also if training was interrupted."""

    def on_exit(self, engine: Any) -> None:
        """Called at the very end of ``fit``, also after an error: the place to close files."""


# The parameters of each method in the library's form and in Keras's, which has two names for those around a batch.
OWN: dict[str, tuple[str, ...]] = {
    stage: tuple(inspect.signature(method).parameters)[1:]
    for stage, method in vars(Callback).items()
    if stage.startswith("on_")
}
KERAS: dict[str, tuple[str, ...]] = {
    name: (*(parameter for parameter in OWN[stage] if parameter in ("epoch", "batch")), "logs")
    for stage in OWN
    for name in (stage, stage.replace("on_batch", "on_train_batch"))
}
KERAS["on_exit"] = ()


class Listener:
    """An object that is a callback, as ``fit`` calls it; raises ArgumentTypeError for an object that is none."""

    def __init__(self, listener: Any) -> None:
        methods = {name: method for name in KERAS if (method := _method(listener, name)) is not None}
        if isinstance(listener, type) or not (methods or isinstance(listener, Callback | Watching)):
            mend = f"; give an object of it: {listener.__name__}()" if isinstance(listener, type) else ""
            raise ArgumentTypeError(
                f"callbacks: expected objects with a method {', '.join(OWN)}, got {listener!r}{mend}"
            )
        keras_only = hasattr(listener, "set_model") or hasattr(listener, "set_params")
        forms = {name: _form(listener, name, method, keras_only) for name, method in methods.items()}
        self.listener, self.epochs = listener, 0
        # whether it gets the engine as an attribute, and what fits both forms has Keras's
        self.keras = keras_only or "keras" in forms.values()
        self._calls: dict[str, list[Callable[..., object]]] = {}
        for name, method in methods.items():
            stage = name.replace("on_train_batch", "on_batch")
            of_keras = forms[name] == "keras" or (forms[name] is None and self.keras)
            self._calls.setdefault(stage, []).append(_of_keras(stage, method) if of_keras else method)

    def at(self, stage: str) -> Callable[..., object] | None:
        """Return what is called at a stage, with the engine and the arguments of ``Callback``; None for nothing."""
        begin = [self._begin] if self.keras and stage == "on_train_begin" else []
        calls = [*begin, *self._calls.get(stage, [])]
        if len(calls) < 2:
            return calls[0] if calls else None
        return lambda *arguments: [call(*arguments) for call in calls]

    @property
    def name(self) -> str:
        """The name of its class."""
        return type(self.listener).__name__

    def _begin(self, engine: Any) -> None:
        if hasattr(self.listener, "set_params"):
            self.listener.set_params({"epochs": self.epochs, "steps": None, "verbose": 0})
        if hasattr(self.listener, "set_model"):
            self.listener.set_model(engine)
        else:
            # An object with slots may refuse the attribute; it works without.
            with contextlib.suppress(AttributeError):
                self.listener.model = engine


def _of_keras(stage: str, method: Callable[..., object]) -> Callable[..., object]:
    """Return a method of Keras's form as one of the library's."""

    def call(engine: Any, *arguments: Any) -> None:
        if stage == "on_train_end":
            arguments = ({name: values[-1] for name, values in arguments[0].history.items()},)
        elif stage not in ("on_epoch_end", "on_exit"):
            # Keras passes logs to every stage.
            arguments = (*arguments, {})
        method(*arguments)

    return call


def _method(listener: Any, stage: str) -> Any:
    """Return an object's own method for a stage, or None; the empty methods of the base classes do not count."""
    method = getattr(listener, stage, None)
    if not callable(method):
        return None
    function = getattr(method, "__func__", method)
    # Keras marks the empty methods of its base class with this attribute.
    placeholder = function is getattr(Callback, stage, None) or getattr(function, "_is_default", False) is True
    return None if placeholder else method


def checked_callbacks(callbacks: Any) -> list[Listener]:
    """Return the callbacks as ``fit`` calls them; ArgumentTypeError for other objects."""
    several = isinstance(callbacks, Iterable) and not isinstance(callbacks, str)
    return [Listener(listener) for listener in (callbacks if several else [callbacks])]


def announce(callbacks: Sequence[Listener], names: Sequence[str], epochs: int) -> None:
    """Tell the callbacks the epochs, and let monitors check ``names`` and those that callbacks before them write."""
    known = list(names)
    for callback in callbacks:
        callback.epochs = epochs
        if isinstance(callback.listener, Watching):
            callback.listener.check_logs(known)
        writes = getattr(callback.listener, "writes", ())
        known += [name for name in ([writes] if isinstance(writes, str) else writes) if name not in known]


@contextlib.contextmanager
def exits(callbacks: Sequence[Listener], engine: Any) -> Iterator[None]:
    """Call ``on_exit`` at the end of the block, also after an error."""
    with contextlib.ExitStack() as stack:
        for callback in reversed(callbacks):
            if call := callback.at("on_exit"):
                stack.callback(call, engine)
        yield


@contextlib.contextmanager
def deferred_interrupt(*others: signal.Signals) -> Iterator[Callable[[], bool]]:
    """Record Ctrl-C, and the signals ``others``, without raising it, so that no update is cut in two; raise a second.

    Yields a function that tells whether it came; never so outside the main thread, or where Ctrl-C is ignored.
    """
    came = False

    def handler(number: int, frame: Any) -> None:
        nonlocal came
        if came:
            raise KeyboardInterrupt
        came = True

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, *others)}
    # None: a program that embeds Python has a handler of its own, which could not be put back. SIG_IGN: a shell has
    # started this in the background, and Ctrl-C is for the command in the foreground.
    before = {number: handling for number, handling in before.items() if handling not in (None, signal.SIG_IGN)}
    try:
        for number in before:
            signal.signal(number, handler)
    except ValueError:
        # outside the main thread of the main interpreter
        yield lambda: False
        return
    try:
        yield lambda: came
    finally:
        for number, handling in before.items():
            signal.signal(number, handling)


class Watching:
    """The base of the library's callbacks in Keras's form: the engine, and a check before the training."""

    model: Any

    def set_model(self, model: Any) -> None:
        """The engine in training."""
        self.model = model

    def check_logs(self, names: Sequence[str]) -> None:
        """Raise ArgumentError if the callback cannot work with logs of these ``names``."""


def tell(verbose: int, text: str, *figures: Any) -> None:
    """Log what a callback has done, for a user who wants it ``verbose`` as information."""
    log.log(logging.INFO if verbose else logging.DEBUG, text, *figures)


def _form(listener: Any, stage: str, method: Any, keras_only: bool) -> str | None:
    """Return "own" or "keras", by the number of parameters, then by their names; None if both forms fit."""
    fits_own = not keras_only and stage in OWN and takes(method, OWN[stage])
    fits_keras = takes(method, KERAS[stage])
    if not fits_own and not fits_keras:
        expected = [_written(stage, OWN)] if stage in OWN else []
        raise ArgumentTypeError(
            f"callbacks: {type(listener).__name__}.{stage}{inspect.signature(method)} cannot be called; expected "
            f"{' or '.join([*expected, _written(stage, KERAS)])} as in Keras"
        )
    if fits_own != fits_keras:
        return "own" if fits_own else "keras"
    names: list[str] = []
    with contextlib.suppress(TypeError, ValueError):
        names = list(inspect.signature(method).parameters)
    if names[:1] == ["engine"]:
        return "own"
    last = len(KERAS[stage]) - 1
    return "keras" if names[last : last + 1] == ["logs"] else None


def takes(method: Any, parameters: Sequence[str]) -> bool:
    """Return whether a method accepts ``parameters``; True if its signature is unknown."""
    try:
        inspect.signature(method).bind(*parameters)
    except (TypeError, ValueError) as error:
        return isinstance(error, ValueError)
    return True


def _written(stage: str, form: dict[str, tuple[str, ...]]) -> str:
    return f"{stage}({', '.join(form[stage])})"
