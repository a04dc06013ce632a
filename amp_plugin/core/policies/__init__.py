"""Ascent policies: AMP for less than its full price, ``AMP(..., ascent="every(2)")``.

The paper's AMP ascends in every step, on the whole batch, along the gradient at the weights, and so costs
``1 + inner_iter`` passes a step. A policy saves some of them, and its documentation says what it approximates by what.
"""

from __future__ import annotations

from amp_plugin.core.policies.adaptive import Adaptive
from amp_plugin.core.policies.combined import Combined
from amp_plugin.core.policies.parse import make_policy
from amp_plugin.core.policies.policy import AscentPolicy, BatchParts, Full
from amp_plugin.core.policies.schedule import Every, Window
from amp_plugin.core.policies.split import Split
from amp_plugin.core.policies.stale import Momentum, Stale
from amp_plugin.core.policies.subset import Subset

__all__ = [
    "Adaptive",
    "AscentPolicy",
    "BatchParts",
    "Combined",
    "Every",
    "Full",
    "Momentum",
    "Split",
    "Stale",
    "Subset",
    "Window",
    "make_policy",
]
