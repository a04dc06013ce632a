"""A pytest plugin: timm's own tests ask of our models and optimizers what they ask of timm's."""

from __future__ import annotations

import dataclasses

import pytest
import timm
from timm.optim import get_optimizer_info
from timm.optim._optim_factory import default_registry

_TIMMS = set(timm.list_models())

import amp_plugin  # noqa: E402, F401  registers

MODELS = sorted(set(timm.list_models()) - _TIMMS)
OPTIMIZERS = ("amp", "ampadamw", "amplamb")
BALLS = {"noball": 0.0, "smallball": 0.001}  # the ball of 0.5 is wider than the valley of Rosenbrock's function
for prefix, epsilon in BALLS.items():
    for name in OPTIMIZERS:
        info = get_optimizer_info(name)
        defaults = {**(info.defaults or {}), "epsilon": epsilon}
        default_registry.register(dataclasses.replace(info, name=prefix + name, defaults=defaults))

NO_BALL = {"sgd": "noballamp", "adamw": "noballampadamw", "lamb": "noballamplamb"}
# What stands in for timm's names in tests that list them; other tests list all that is registered.
INSTEAD = {
    **dict.fromkeys(("test_sgd", "test_adam", "test_lamb"), NO_BALL),
    "test_lookahead_sgd": {"lookahead_sgd": "lookahead_smallballamp"},
    "test_lookahead_adam": {"lookahead_adamw": "lookahead_smallballampadamw"},
    "test_optim_factory": {name: name for name in OPTIMIZERS},
}


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Ask each test of an optimizer or a model about ours."""
    marks = metafunc.definition.own_markers
    marks[:] = [_about_ours(mark, metafunc.function.__name__) for mark in marks]


def _about_ours(mark: pytest.Mark, test: str) -> pytest.Mark:
    about, values = mark.args if mark.name == "parametrize" else ("", [])
    if about == "optimizer":
        ours = [INSTEAD[test][value] for value in values if value in INSTEAD.get(test, {})]
    elif about == "model_name":
        ours = MODELS
    else:
        return mark
    return pytest.mark.parametrize(about, ours).mark


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out tests of what timm alone has."""
    asked = {*MODELS, *(name for names in INSTEAD.values() for name in names.values())}
    ours = [item for item in items if asked & {str(v) for v in getattr(item, "callspec", _NONE).params.values()}]
    config.hook.pytest_deselected(items=[item for item in items if item not in ours])
    items[:] = ours


class _NONE:
    params: dict[str, object] = {}  # noqa: RUF012
