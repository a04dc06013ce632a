"""Defects that other implementations of AMP and SAM had, the guard against each, and the test that it keeps green.

Removing a guard is a replacement in one file of the package; test_pitfalls.py makes it in a copy and sees the test go
red. ``python tests/helpers/pitfalls.py`` prints the table that PITFALLS.md holds.
"""

from __future__ import annotations

from typing import NamedTuple


class Pitfall(NamedTuple):
    """One defect.

    Attributes:
        what: in a phrase.
        seen: where.
        file: of the guard, in the package.
        guard: the code.
        without: what takes its place.
        test: ``file::name``, in the tests' folder, which fails then.
    """

    what: str
    seen: str
    file: str
    guard: str
    without: str
    test: str


PITFALLS = [
    Pitfall(
        "wrapper and base optimizer have different groups after a load; the schedule moves the wrong one",
        "released AMP, mosaicml/composer#3259",
        "core/wrapper.py",
        "        return self.base_optimizer.param_groups\n",
        '        return self.__dict__.setdefault("_groups", self.base_optimizer.param_groups)\n',
        "core/test_wrapper.py::test_schedulers_move_the_learning_rate_that_trains",
    ),
    Pitfall(
        "the momentum is not in the state_dict",
        "davda54/sam#73, kozistr/pytorch_optimizer#576",
        "core/wrapper.py",
        "        return self.base_optimizer.state_dict()\n",
        '        return {**self.base_optimizer.state_dict(), "state": {}}\n',
        "core/test_wrapper.py::test_resume_is_bit_exact",
    ),
    Pitfall(
        "the perturbation leaks into checkpoints",
        "by running other implementations",
        "core/optimizer.py",
        "        step.ascents += 1\n",
        "        step.ascents += 1\n        for a in ascents:\n"
        '            self.state[a.param]["theta"] = a.param.clone()\n',
        "core/test_wrapper.py::test_the_state_is_the_base_optimizers_and_loads_as_weights_only",
    ),
    Pitfall(
        "copies and pickles lose attributes",
        "torch.optim.Optimizer.__getstate__",
        "core/optimizer.py",
        '        return {**super().__getstate__(), "_skipped": self.skipped_steps}\n',
        "        return OptimizerWrapper.__base__.__getstate__(self)\n",
        "core/test_wrapper.py::test_deepcopy_and_pickle_train_on_like_the_original",
    ),
    Pitfall(
        "restoring by subtraction rounds",
        "released AMP, by running it",
        "core/perturbation.py",
        "        torch._foreach_copy_(params, [self._backups[p] for p in self._displaced])\n",
        "        backups = [self._backups[p] for p in self._displaced]\n"
        "        torch._foreach_sub_(params, torch._foreach_sub(params, backups))\n",
        "core/test_perturbation.py::test_restore_is_exact_to_the_bit_and_in_place",
    ),
    Pitfall(
        "weights are given another storage, which DDP's buckets, compiled graphs and views do not follow",
        "several SAM packages",
        "core/perturbation.py",
        "        torch._foreach_copy_(params, [self._backups[p] for p in self._displaced])\n",
        "        for p in self._displaced:\n            p.data = self._backups[p].clone()\n",
        "core/test_perturbation.py::test_restore_is_exact_to_the_bit_and_in_place",
    ),
    Pitfall(
        "an exception in the second pass leaves the weights perturbed",
        "three packages, by running them",
        "core/optimizer.py",
        "        except BaseException:\n            self.restore()\n            self._set_gradients({})\n",
        "        except BaseException:\n            self._set_gradients({})\n",
        "core/test_optimizer.py::test_an_exception_in_any_pass_leaves_the_weights_as_they_were",
    ),
    Pitfall(
        "a parameter without a gradient in the second pass stays perturbed",
        "kozistr/pytorch_optimizer, by running it",
        "core/perturbation.py",
        "        if not self._displaced:\n            return\n        versions",
        "        self._displaced = {p: v for p, v in self._displaced.items() if p.grad is not None}\n        versions",
        "core/test_optimizer.py::test_a_gradient_in_only_one_of_the_passes",
    ),
    Pitfall(
        "a parameter whose first gradient comes in the second ascent is a KeyError",
        "by running other implementations",
        "core/perturbation.py",
        "                if grad is None:\n                    continue\n",
        "                if grad is None or self._displaced:\n                    raise KeyError(param)\n",
        "core/test_optimizer.py::test_frozen_unused_tied_scalar_complex_and_an_empty_group",
    ),
    Pitfall(
        "a zero gradient gives 0 / 0 and NaN weights",
        "google-deepmind/optax#1743",
        "core/perturbation.py",
        ".reciprocal().clamp_(max=1.0)",
        ".reciprocal()",
        "core/test_perturbation.py::test_a_zero_gradient_moves_nothing",
    ),
    Pitfall(
        "a NaN in the ascent's gradient makes the weights NaN",
        "two packages, by running them",
        "core/perturbation.py",
        "        finite = all_finite(ratios)\n",
        "        finite = all_finite(ratios).logical_or(torch.tensor(True))\n",
        "core/test_perturbation.py::test_non_finite_gradients_leave_every_tensor_alone",
    ),
    Pitfall(
        "a loss of exactly 0.0 is taken for a failed step",
        "mosaicml/composer",
        "core/optimizer.py",
        "                results.append(closure())\n",
        "                results.append(closure())\n                assert results[-1]\n",
        "core/test_optimizer.py::test_a_loss_of_exactly_zero_is_a_loss_like_any_other",
    ),
    Pitfall(
        "16-bit weights swallow small perturbations, and nobody says so",
        "by running other implementations",
        "core/optimizer.py",
        "        if any(a.param.dtype in LOW_PRECISION",
        "        if not any(a.param.dtype in LOW_PRECISION",
        "core/test_base.py::test_sixteen_bit_weights_are_warned_about_once",
    ),
    Pitfall(
        "the ascent's gradient carries the loss scale",
        "davda54/sam#7, #11, #79",
        "core/explicit_passes.py",
        "self._ascend(grad_scale, share)\n",
        "self._ascend(1.0, share)\n",
        "core/test_optimizer.py::test_the_gradient_scale_is_divided_out_of_the_ascent",
    ),
    Pitfall(
        "an overflow in the ascent alone neither skips the step nor lowers the scale",
        "davda54/sam#7",
        "core/grad_scaler.py",
        "            grad.fill_(torch.inf)\n",
        "            pass\n",
        "doors/test_transformers.py::test_an_overflow_in_the_ascent_alone_lowers_the_scale",
    ),
    Pitfall(
        "a closure that accelerate passes to a gradient scaler trains on scaled gradients",
        "accelerate, by running it",
        "core/grad_scaler.py",
        '    if hasattr(optimizer, "found_inf"):\n        raise',
        "    if False:\n        raise",
        "core/test_gradient_scaler.py::test_a_gradient_scaler_with_a_closure_is_refused",
    ),
    Pitfall(
        "autocast's cache serves the second pass the weights of the first",
        "by running other implementations",
        "core/perturbation.py",
        "        torch.clear_autocast_cache()\n",
        "        pass\n",
        "core/test_perturbation.py::test_autocast_sees_the_moved_weights",
    ),
    Pitfall(
        "per-process ascents are averaged after all",
        "the README of davda54/sam",
        "doors/trainer.py",
        "sync and k == len(part)",
        "k == len(part)",
        "doors/test_transformers.py::test_two_processes_equal_one",
    ),
    Pitfall(
        "under FSDP2 the norm is that of one process's part",
        "by running other implementations",
        "core/perturbation.py",
        "global_norms(norms_of(b.deltas), b.split)",
        "norms_of(b.deltas)",
        "core/test_fsdp.py::test_two_processes_equal_one",
    ),
    Pitfall(
        "gradients that FSDP2 has not synchronised are not in .grad, so the ascent goes nowhere",
        "by running other implementations",
        "core/selection.py",
        "    if sharded and all(",
        "    if not sharded and all(",
        "core/test_fsdp.py::test_an_ascent_without_gradient_synchronisation_is_an_error_that_says_so",
    ),
    Pitfall(
        "BatchNorm layers are found by their name, so others are updated in every pass",
        "several SAM packages",
        "core/replay.py",
        'for m in self.module.modules()] if self.batch_norm == "clean"',
        'for m in self.module.modules() if "BatchNorm" in str(m)] if self.batch_norm == "clean"',
        "core/test_passes.py::test_statistics_that_a_layer_replaces_are_kept_as_well",
    ),
    Pitfall(
        "hosts call step() without a closure",
        "davda54/sam#8, #66; kozistr/pytorch_optimizer#64; huggingface/pytorch-image-models#1366",
        "doors/perturbed_backward.py",
        "            self._amp.progress.descents.append(self._displacement)\n",
        "            pass\n",
        "doors/test_attach.py::test_it_is_the_closure_bit_for_bit",
    ),
    Pitfall(
        "a step without any ascent is plain SGD",
        "several SAM packages",
        "core/optimizer.py",
        "                trains = self._check_ascents()\n",
        "                trains = True\n",
        "core/test_optimizer.py::test_a_step_without_ascent_is_an_error_that_names_the_ways_out",
    ),
    Pitfall(
        "the host clips a gradient that is not the one that is used",
        "by running other implementations",
        "core/optimizer.py",
        "                self.base_optimizer.step()\n",
        "                torch._foreach_mul_(self.gradients(), 2.0)\n                self.base_optimizer.step()\n",
        "doors/test_attach.py::test_the_trajectory_is_the_references",
    ),
    Pitfall(
        "with accumulation the ascent sees only one micro-batch",
        "davda54/sam#3, #62, #94",
        "doors/trainer.py",
        "model, window.batches, scale, sync",
        "model, window.batches[-1:], scale, sync",
        "doors/test_transformers.py::test_a_window_equals_one_large_batch",
    ),
    Pitfall(
        "models that ignore num_items_in_batch give k times the gradient with k micro-batches",
        "huggingface/transformers#47688",
        "doors/trainer.py",
        "            if self._loss_uses_num_items is False:\n",
        "            if self._loss_uses_num_items is None:\n",
        "doors/test_transformers.py::test_models_that_ignore_num_items_in_batch_get_the_right_scale",
    ),
    Pitfall(
        "a module takes its batch to pieces, and the second pass finds it empty",
        "label smoothing in transformers.Trainer",
        "core/inputs.py",
        "    return map_tensors(_detached_leaf, arguments)\n",
        "    return arguments\n",
        "doors/test_attach.py::test_a_batch_that_the_module_takes_to_pieces",
    ),
    Pitfall(
        "a stop in the middle of a window saves perturbed weights",
        "by running other implementations",
        "doors/trainer.py",
        "        self.callback_handler.callbacks.insert(0, _EndOfEpoch(self))\n",
        "",
        "doors/test_transformers.py::test_a_stop_in_the_middle_of_a_window_saves_clean_weights",
    ),
    Pitfall(
        "the logged loss is the perturbed one",
        "mosaicml/composer#1518, #1952",
        "doors/trainer.py",
        "            loss = window.clean_losses[len(window.amp_losses) - 1]\n",
        "            loss = window.amp_losses[-1]\n",
        "doors/test_transformers.py::test_a_window_equals_one_large_batch",
    ),
]


def table() -> str:
    """The list as a Markdown document."""
    lines = [
        "# Pitfalls",
        "",
        "Made by `python tests/helpers/pitfalls.py > tests/records/PITFALLS.md`; do not edit. What other",
        "implementations get wrong, and the test that fails when the guard against it is taken out of this one:",
        "`pytest tests/core/test_pitfalls.py -m slow` takes each out of a copy of the package and sees its test fail.",
        "",
        "| defect | seen in | guard in | test |",
        "| --- | --- | --- | --- |",
        *(f"| {p.what} | {p.seen} | `{p.file}` | `{p.test}` |" for p in PITFALLS),
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
