"""The samplers by name, and the times at which their steps begin; imports no JAX."""

import itertools
from collections.abc import Sequence
from typing import Literal, get_args

Sampler = Literal["euler", "renoise", "policy"]
SAMPLERS = get_args(Sampler)


def check_timesteps(timesteps: Sequence[float]) -> tuple[float, ...]:
    """The times at which steps begin, as numbers; the last step ends at 0.

    Raises:
      ValueError: they do not fall from 1 to above 0.
    """
    times = [float(t) for t in timesteps]
    falling = all(a > b for a, b in itertools.pairwise([*times, 0.0]))
    if not times or times[0] != 1 or not falling:
        shown = ", ".join(f"{t:g}" for t in times) or "none"
        raise ValueError(
            f"the timesteps are {shown}; expected the times at which steps begin, falling from 1 "
            "(noise) to above 0, such as 1, 0.75, 0.5, 0.25"
        )
    return tuple(times)
