"""A world of one rank, which is this process."""

import pytest
import worlds

from fusemlp.runtime.ranks import VARIABLES


@pytest.fixture(scope="module")
def alone():
    """Make this process the only rank of a world, until the module's tests have ended."""
    distributed = pytest.importorskip("torch.distributed")
    with pytest.MonkeyPatch.context() as changed:
        for name, value in zip(VARIABLES, ("0", "1", "127.0.0.1", str(worlds.free_port())), strict=True):
            changed.setenv(name, value)
        yield
        if distributed.is_initialized():
            distributed.destroy_process_group()
