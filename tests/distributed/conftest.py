"""A world of one rank, which is this process."""

import pytest
import worlds


@pytest.fixture(scope="module")
def alone():
    """Make this process the only rank of a world, until the module's tests have ended."""
    distributed = pytest.importorskip("torch.distributed")
    with pytest.MonkeyPatch.context() as changed:
        worlds.as_rank(changed, port=worlds.free_port())
        yield
        if distributed.is_initialized():
            distributed.destroy_process_group()
