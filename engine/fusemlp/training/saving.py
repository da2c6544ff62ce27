"""Save a model as one safetensors file: the parameters by torch's names, and the architecture as JSON.

Any reader of safetensors gets the parameters of the same ``nn.Sequential`` of Linear layers and activations:
``0.weight`` (out, in), ``0.bias``, ``2.weight``, ..., and ``1.weight`` (1,) for the slope of a PReLU. The metadata
entry ``fusemlp_model`` describes network, loss and optimizer, for ``load``. The state of the training (moments,
counters, history) is in a checkpoint only.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from fusemlp.runtime.files import (
    CHECKPOINT,
    DIGEST,
    MODEL,
    check_finite,
    checked_metadata,
    model_file,
    to_bytes,
    write_atomically,
)
from fusemlp.runtime.session import Session

# "format" tells other readers that names and layouts are torch's.
RESERVED = {MODEL.entry, DIGEST, CHECKPOINT.entry, "format"}


def save(engine: Session, path: str | Path, *, metadata: Mapping[str, str] | None = None) -> None:
    """Write parameters and description to ``path`` atomically; see ``Engine.save``."""
    target = model_file(path)
    content = model_bytes(engine, metadata)
    if engine.ranks.leads:
        write_atomically(target, content)


def model_bytes(engine: Session, metadata: Mapping[str, str] | None = None) -> bytes:
    """Return the content of the file of ``save``."""
    own = checked_metadata(metadata, RESERVED)
    tensors = engine.state_dict()
    check_finite(tensors, MODEL.name)
    return to_bytes(MODEL, engine.description(), tensors, **{"format": "pt", **own})
