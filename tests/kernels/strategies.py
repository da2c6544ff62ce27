"""Random cases for the tests of a backend: sizes, memory layouts, values, and their number.

NumPy runs 300 cases a test. Triton's interpreter takes milliseconds for every program of a launch, so it runs fewer, of
smaller sizes (``devices.INTERPRETER`` has the numbers).
"""

import pytest
from devices import DEVICE_PARAMETERS
from hypothesis import given, seed, settings
from hypothesis import strategies as st

seeds = st.integers(0, 2**32 - 1)
# After its first ten cases Hypothesis mostly varies the previous case, which shows little new about a kernel. So the
# cases of a test are drawn in rounds of this many.
ROUND = 10


def contract_test(devices=DEVICE_PARAMETERS, **arguments):
    """Make a test of random cases on every device, or on some, as parameters.

    Each argument is a strategy, or a function that returns one for a device. ``test.of_case`` is the test of one case.
    """

    def decorate(test):
        @pytest.mark.parametrize("device", devices)
        def on_device(device):
            drawn = {k: v if isinstance(v, st.SearchStrategy) else v(device) for k, v in arguments.items()}

            for start in range(0, device.examples, ROUND):

                @seed(start)
                @settings(max_examples=ROUND, deadline=None, derandomize=True, database=None)
                @given(**drawn)
                def cases(**case):
                    test(**case)

                cases()

        for name in ("__name__", "__qualname__", "__module__", "__doc__"):
            setattr(on_device, name, getattr(test, name))
        on_device.of_case = test
        return on_device

    return decorate


def variants(device):
    """Draw the device in one of its precisions."""
    return st.sampled_from(device.variants)


def sizes(device, low=0):
    """Draw a dimension of an array, mostly at an edge."""
    return st.one_of(st.sampled_from([size for size in device.edges if size >= low]), st.integers(low, device.longest))


def placements(device, count=1):
    """Draw the layouts of ``count`` inputs and of the outputs: of all kinds, or all as the backend's own."""
    inputs = st.tuples(*[st.sampled_from(device.layouts)] * count)
    mixed = st.tuples(inputs, st.sampled_from(device.output_layouts))
    return mixed if device.on_host else st.one_of(st.just((("owned",) * count, "owned")), mixed)
