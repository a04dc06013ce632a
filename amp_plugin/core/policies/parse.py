"""The parser of ``ascent="every(2), subset(0.5)"``."""

from __future__ import annotations

import ast
import copy
from dataclasses import fields

from amp_plugin.core.policies.adaptive import Adaptive
from amp_plugin.core.policies.combined import Combined
from amp_plugin.core.policies.policy import AscentPolicy, Full
from amp_plugin.core.policies.schedule import Every, Window
from amp_plugin.core.policies.split import Split
from amp_plugin.core.policies.stale import Momentum, Stale
from amp_plugin.core.policies.subset import Subset
from amp_plugin.suggest import did_you_mean

KINDS: dict[str, type[AscentPolicy]] = {
    kind.name: kind for kind in (Full, Subset, Split, Every, Window, Stale, Momentum, Adaptive)
}
EXAMPLES = "'full', 'subset(0.5)', 'split(0.25)', 'every(2)', 'window(0.5, 1.0)', 'stale', 'momentum', 'adaptive(0.0)'"


def make_policy(ascent: str | AscentPolicy) -> AscentPolicy:
    """Return the policy that a string describes, or a copy of a policy, because a policy belongs to one optimizer.

    Args:
        ascent: policy; or one or several descriptions of policies, separated by commas.

    Raises:
        ValueError: a policy is unknown, its arguments are wrong, or the policies do not go together.
        TypeError: this is neither a string nor a policy.
    """
    if isinstance(ascent, AscentPolicy):
        return copy.deepcopy(ascent)
    if not isinstance(ascent, str):
        raise TypeError(f"ascent must be a string such as {EXAMPLES}, or an AscentPolicy, got {ascent!r}")
    try:
        tree = ast.parse(ascent.strip(), mode="eval").body
    except (SyntaxError, ValueError):
        raise _malformed(ascent) from None
    policies = [_made(part, ascent) for part in (tree.elts if isinstance(tree, ast.Tuple) else [tree])]
    if not policies:
        raise _malformed(ascent)
    return policies[0] if len(policies) == 1 else Combined(tuple(policies))


def _made(node: ast.expr, ascent: str) -> AscentPolicy:
    call = node if isinstance(node, ast.Call) else None
    name = call.func if call else node
    if not isinstance(name, ast.Name):
        raise _malformed(ascent)
    kind = KINDS.get(name.id)
    if kind is None:
        raise ValueError(f"ascent={ascent!r}: {name.id!r} is unknown{did_you_mean(name.id, KINDS)}; known: {EXAMPLES}")
    try:
        arguments = [ast.literal_eval(a) for a in call.args] if call else []
        named = {str(k.arg): ast.literal_eval(k.value) for k in call.keywords} if call else {}
    except ValueError:
        raise _malformed(ascent) from None
    try:
        return kind(*arguments, **named)
    except TypeError:
        wanted = ", ".join(field.name for field in fields(kind) if field.init)
        raise ValueError(
            f"ascent={ascent!r}: {name.id} takes {f'({wanted})' if wanted else 'no arguments'}, got {ast.unparse(node)}"
        ) from None


def _malformed(ascent: str) -> ValueError:
    return ValueError(
        f"ascent={ascent!r} cannot be read; use one of {EXAMPLES}, or several, separated by commas:"
        " 'every(2), subset(0.5)'"
    )
