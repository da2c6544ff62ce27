"""The sample of the emulator's tests that ``ci/test`` runs: cases that have between them each value of each parameter.

So each kernel, card, type of elements, instruction of products, loss, optimizer and plan stays, and not each together
with each: compiling all of them takes minutes.
"""

import math
from collections import Counter


def values_of(parameters):
    """Return the values of a case; those in a tuple, such as (card, type), count one by one."""
    parts = {name: value if isinstance(value, tuple) else (value,) for name, value in parameters.items()}
    return {(name, place, repr(part)) for name, value in parts.items() for place, part in enumerate(value)}


def covering(cases):
    """Return the places, in order, of cases that have all values of ``cases``, mappings of parameters.

    Greedy: the next case has the most values that none before it has; a value of few cases counts for more. The choice
    is the same in each process, whose sets have orders of their own: ``fsum`` does not depend on them.
    """
    values = list(map(values_of, cases))
    frequency = Counter(value for case in values for value in case)
    missing, chosen = set(frequency), []
    while missing:
        gains = [math.fsum(1 / frequency[value] for value in case & missing) for case in values]
        best = gains.index(max(gains))
        missing -= values[best]
        chosen.append(best)
    return sorted(chosen)
