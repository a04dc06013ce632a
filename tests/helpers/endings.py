"""How a command ends, in this process."""

from __future__ import annotations

from collections.abc import Callable

import pytest


def error_of(command: Callable[[], object]) -> str:
    """The one line with which a command ends that goes through `amp_plugin.command.run_command`."""
    with pytest.raises(SystemExit) as left:
        command()
    code = left.value.code
    assert isinstance(code, str), "sys.exit prints a text, and exits with 1"
    assert code.startswith("error: ")
    assert "\n" not in code
    return code
