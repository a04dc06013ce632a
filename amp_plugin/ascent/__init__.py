"""Ascent policies: AMP for less than its full price, ``AMP(..., ascent="every(2)")``.

The paper's AMP ascends in every step, on the whole batch, along the gradient at the weights, and so costs
``1 + inner_iter`` passes a step. A policy spares some of that, and says what it approximates by what.
"""

from __future__ import annotations

from amp_plugin.ascent.adaptive import Adaptive
from amp_plugin.ascent.combined import Combined
from amp_plugin.ascent.parameters import Parameters
from amp_plugin.ascent.policy import AscentPolicy, Full
from amp_plugin.ascent.schedule import Every, Window
from amp_plugin.ascent.spelling import make_policy
from amp_plugin.ascent.stale import Momentum, Stale
from amp_plugin.ascent.subset import Subset

__all__ = [
    "Adaptive",
    "AscentPolicy",
    "Combined",
    "Every",
    "Full",
    "Momentum",
    "Parameters",
    "Stale",
    "Subset",
    "Window",
    "make_policy",
]
