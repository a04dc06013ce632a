"""Counter-based randomness: a draw is a function of seed, stream and sample alone.

Philox (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) is such a function; NumPy
promises that its raw output never changes, so a seed means the same on every machine.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

_MAX_KEY = 2**64 - 1
SELECTION_STREAM, NOISE_STREAM = _MAX_KEY, _MAX_KEY - 1  # streams that no epoch reaches


def uniform_draws(seed: int, stream: int, samples: int, columns: int) -> npt.NDArray[np.float64]:
    """Draw ``columns`` numbers for each sample; the row of sample i does not depend on ``samples``.

    The numbers are multiples of 2**-32 in [0, 1), so that ``floor(n * draw)`` is exact for every n < 2**21.
    """
    for name, value in (("seed", seed), ("stream", stream)):
        if not 0 <= value <= _MAX_KEY:
            raise ValueError(f"{name} must lie in [0, 2**64), got {value}")
    size = samples * columns
    words = np.random.Philox(key=np.array([seed, stream], dtype=np.uint64)).random_raw((size + 1) // 2)
    halves = words.astype("<u8", copy=False).view("<u4")[:size]
    return halves.reshape(samples, columns) * 2.0**-32
