"""Texts of :class:`amp_plugin.AMP` that are longer than the code around them."""

from __future__ import annotations


def missing_ascents(wanted: int, made: int) -> str:
    """Say that a step would train without the perturbation, and what to do instead."""
    return (
        f"AMP.step() without a closure needs {wanted} ascent step(s) before it, got {made}; it"
        " would train without the perturbation that you asked for. Use one of: optimizer.step(closure);"
        " loss.backward(), optimizer.ascend(), loss.backward(), optimizer.step(); the same with `for _ in"
        " optimizer.ascent_passes(): loss.backward()`, whatever the ascent policy; amp_plugin.attach(optimizer,"
        " module) with a module that returns its loss; or amp_plugin.AMPTrainer."
        " (After an interrupted step, optimizer.restore() starts afresh.)"
    )


def unreached(number: int, parameters: object) -> str:
    """Say that parameters of the ball had a gradient in the descent alone."""
    return (
        f"AMP: {number} parameters of the ball (parameters={parameters!r}) have a gradient, but had"
        " none in the ascent pass, so they were not perturbed: gradient checkpointing with use_reentrant=True"
        " drops the gradients behind an input that requires none; take use_reentrant=False"
    )


def skipped(steps: int) -> str:
    """Say that a step was skipped, and how many were."""
    return (
        "AMP: the ascent gradient had NaN or infinite entries; the step was skipped and the weights left as"
        f" they were ({steps} so far)"
    )
