"""The experiment trackers that a run reports to."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations


def require_trackers(names: Iterable[str]) -> None:
    """See whether trackers can be used, before anything takes its time.

    Args:
        names: as ``report_to`` of `transformers.TrainingArguments` takes them.

    Raises:
        ValueError: one is unknown, or not installed.
    """
    installed = get_available_reporting_integrations()
    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            near = difflib.get_close_matches(name, INTEGRATION_TO_CALLBACK, n=1)
            hint = f"did you mean {near[0]!r}" if near else f"there are {', '.join(INTEGRATION_TO_CALLBACK)}"
            raise ValueError(f"tracker {name!r} is unknown; {hint}?")
        if name not in installed:
            package = '"amp-plugin[tensorboard]"' if name == "tensorboard" else name.replace("_", "-")
            raise ValueError(f"--report_to {name}: {name} is not installed (pip install {package})")
