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
        "        torch._foreach_copy_(params, [self._backups[id(p)] for p in self._displaced])\n",
        "        backups = [self._backups[id(p)] for p in self._displaced]\n"
        "        torch._foreach_sub_(params, torch._foreach_sub(params, backups))\n",
        "core/test_perturbation.py::test_restore_is_exact_to_the_bit_and_in_place",
    ),
    Pitfall(
        "weights are given another storage, which DDP's buckets, compiled graphs and views do not follow",
        "several SAM packages",
        "core/perturbation.py",
        "        torch._foreach_copy_(params, [self._backups[id(p)] for p in self._displaced])\n",
        "        for p in self._displaced:\n            p.data = self._backups[id(p)].clone()\n",
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
        "    torch.clear_autocast_cache()\n",
        "    pass\n",
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
        "core/module_state.py",
        "        if buffers and part._buffers:\n",
        '        if buffers and "BatchNorm" in str(part):\n',
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
        "            window.batches,\n",
        "            window.batches[-1:],\n",
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
        "    return map_tensors(_detached_leaf, batch)\n",
        "    return batch\n",
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
    Pitfall(
        "a momentum encoder is moved by every pass of a step",
        "facebookresearch/moco in a closure",
        "core/module_state.py",
        "        found += frozen if size <= 0 else []\n",
        "        pass\n",
        "core/test_one_function.py::test_state_and_randomness_are_replayed",
    ),
    Pitfall(
        "a hidden state in a plain attribute goes on in every pass",
        "stateful recurrent networks",
        "core/replay.py",
        "            self._attributes = self._start.settle_attributes(parts)\n",
        "            self._attributes = []\n",
        "core/test_one_function.py::test_state_and_randomness_are_replayed",
    ),
    Pitfall(
        "masks drawn with numpy differ between the passes",
        "SpecAugment in transformers",
        "core/replay.py",
        '            yield sys.modules["numpy"].random\n',
        "            pass\n",
        "core/test_one_function.py::test_state_and_randomness_are_replayed",
    ),
    Pitfall(
        "`parametrize.cached` serves the second pass the weights of the first",
        "torch.nn.utils.parametrize",
        "core/perturbation.py",
        "    parametrize._cache.clear()\n",
        "",
        "core/test_module_kinds.py::test_a_weight_that_was_computed_before_the_perturbation_is_computed_again",
    ),
    Pitfall(
        "a pass changes the batch, and the next one sees another",
        "pyg-team/pytorch_geometric#9505",
        "doors/window.py",
        "            watch.check(culprit)\n",
        "",
        "doors/test_nothing_silent.py::test_a_model_that_changes_its_batch_is_refused_by_the_trainer_too",
    ),
    Pitfall(
        "gradients of another optimizer's parameters add up over the passes",
        "davda54/sam#64",
        "core/replay.py",
        "            aside.put_back()\n",
        "            pass\n",
        "core/test_other_gradients.py::test_only_the_descents_gradient_counts",
    ),
    Pitfall(
        "gradients of a loss's own parameters, which no module holds, add up over the passes",
        "KaiyangZhou/pytorch-center-loss#22",
        "doors/attach.py",
        "                    passes.spare_leaves(loss)\n",
        "",
        "core/test_other_gradients.py::test_only_the_descents_gradient_counts",
    ),
    Pitfall(
        "another optimizer steps on gradients that are sums over the passes of a loop of one's own",
        "KaiyangZhou/pytorch-center-loss#22",
        "core/explicit_passes.py",
        "    self.others_check.look(self._params())\n",
        "",
        "core/test_other_gradients.py::test_another_optimizer_does_not_step_on_a_sum_over_passes",
    ),
    Pitfall(
        "a closure that does nothing makes a plain step with the gradients that lie there",
        "Lightning's manual optimization",
        "core/optimizer.py",
        "                ascended |= bool(self.gradients())\n",
        "                ascended = True\n",
        "core/test_optimizer.py::test_a_closure_without_backward_is_an_error",
    ),
    Pitfall(
        "the ascent of a loss that is negated outside the module goes to the best point",
        "zhengliz/natural-adversary#2",
        "core/complaints.py",
        "    if any(factor.value() < 0 for factor in (step.factors if step.unread is None else step.unread)):\n",
        "    if False:\n",
        "doors/test_nothing_silent.py::test_a_loss_that_is_reversed_outside_the_module_is_an_error",
    ),
    Pitfall(
        "the optimizer holds copies of the weights, and the loop never sees the perturbation",
        "davda54/sam#7",
        "core/complaints.py",
        "    if amp.delta_check.was_unseen():\n",
        "    if False:\n",
        "doors/test_nothing_silent.py::test_a_loop_that_never_sees_delta_is_told",
    ),
    Pitfall(
        "ZeroRedundancyOptimizer gives each process's shard an ascent of its own",
        "pytorch/pytorch#46750",
        "core/base_optimizer.py",
        "    _check_not_within_zero()\n",
        "",
        "doors/test_nothing_silent.py::test_zero_redundancy_around_amp_is_refused_and_inside_it_works",
    ),
    Pitfall(
        "a subclass's training_step acts on the descent alone",
        "by running third-party trainers",
        "doors/trainer.py",
        "                setattr(cls, name, wrapped(vars(cls)[name]))\n",
        "                pass\n",
        "doors/test_nothing_silent.py::test_a_step_of_a_subclass_acts_in_every_pass",
    ),
    Pitfall(
        "inputs are generated anew in every pass",
        "GRPO in huggingface/trl",
        "doors/trainer.py",
        "        if window.current not in window.prepared:\n",
        "        if True:\n",
        "doors/test_nothing_silent.py::test_inputs_are_prepared_once_for_all_passes",
    ),
    Pitfall(
        "a step that the scaler has skipped makes the next good one be skipped",
        "pytorch/pytorch#42754",
        "core/step.py",
        "        return bool(filled) and all(",
        "        return False and all(",
        "doors/test_nothing_silent.py::test_a_step_that_the_scaler_skips_leaves_nothing_for_the_next",
    ),
    Pitfall(
        "options of AMP beside a plain optimizer have no effect, and nobody says so",
        "by swapping AMPTrainer into a script",
        "doors/training_args.py",
        "        if given and not self.uses_amp and not self.compares_with_amp:\n",
        "        if False:\n",
        "doors/test_transformers.py::test_options_of_amp_without_amp_are_an_error",
    ),
    Pitfall(
        "a loss that is made of the model's other outputs (distillation) has no part in the ascent",
        "by attaching to a student",
        "doors/perturbed_backward.py",
        "        if wanted or any(grad is not None for grad in grads):\n",
        "        if wanted:\n",
        "doors/test_attach_outputs.py::test_a_loss_made_of_other_outputs_is_an_error",
    ),
    Pitfall(
        "a gradient that the loop keeps is overwritten by the perturbation",
        "by looking at gradients after a step",
        "core/shared_memory.py",
        "    held = _references_to_gradient(param) > _FREE\n",
        "    held = False\n",
        "doors/test_nothing_left.py::test_a_gradient_that_is_kept_is_never_written_to",
    ),
    Pitfall(
        "a closure keeps gradients from before the step in the descent, and nobody says so",
        "davda54/sam#3",
        "core/complaints.py",
        "    if any(kept):\n",
        "    if False:\n",
        "doors/test_nothing_silent.py::test_gradients_that_a_closure_does_not_clear_are_told_once",
    ),
    Pitfall(
        "a second-order base optimizer is taken, and fails in its first step",
        "AdaHessian in timm",
        "core/base_optimizer.py",
        '    if getattr(base, "is_second_order", False):\n',
        "    if False:\n",
        "doors/test_nothing_silent.py::test_base_optimizers_that_cannot_be_driven_are_refused_when_made",
    ),
    Pitfall(
        "a base optimizer that does not let its groups be set is taken, and fails as a wrapper is made around it",
        "by running other implementations",
        "core/base_optimizer.py",
        "    if isinstance(groups, property) and groups.fset is None:\n",
        "    if False:\n",
        "doors/test_nothing_silent.py::test_base_optimizers_that_cannot_be_driven_are_refused_when_made",
    ),
    Pitfall(
        "a checkpoint's radius replaces the one that was asked for, and nobody says so",
        "by resuming with another amp_epsilon",
        "core/complaints.py",
        "        for mine, theirs in sorted(changes):\n",
        "        for mine, theirs in ():\n",
        "doors/test_nothing_silent.py::test_a_checkpoint_with_other_hyper_parameters_says_which_win",
    ),
    Pitfall(
        "an expanded buffer cannot be put back in place, so the step fails",
        "position ids in transformers",
        "core/module_state.py",
        "    return not any(stride == 0 and size > 1 for ",
        "    return not any(False for ",
        "doors/test_nothing_silent.py::test_buffers_that_cannot_be_written_are_left_alone",
    ),
    Pitfall(
        "a buffer that was made in inference mode cannot be put back in place, so the step fails",
        "torch.inference_mode",
        "core/module_state.py",
        " or tensor.is_inference():\n",
        ":\n",
        "doors/test_nothing_silent.py::test_buffers_that_cannot_be_written_are_left_alone",
    ),
    Pitfall(
        "a lazily conjugated buffer cannot be put back by a batched kernel, so the step fails",
        "torch.Tensor.conj",
        "core/module_state.py",
        "    if tensor.is_conj() or tensor.is_neg():",
        "    if False:",
        "doors/test_nothing_silent.py::test_buffers_that_cannot_be_written_are_left_alone",
    ),
    Pitfall(
        "masks from a generator of the model's own differ between the passes",
        "torch.Generator in diffusion models",
        "core/replay.py",
        "        yield from self.generators\n",
        "",
        "doors/test_nothing_silent.py::test_generators_that_the_user_names_are_replayed",
    ),
    Pitfall(
        "a frozen backbone is copied in every step, though nothing moves it",
        "fine-tuning with adapters",
        "core/module_state.py",
        "        found += frozen if size <= 0 else []\n",
        "        found += frozen\n",
        "doors/test_nothing_silent.py::test_a_backbone_larger_than_what_is_trained_is_not_copied",
    ),
    Pitfall(
        "floats and integers in one batched copy take a kernel launch a tensor",
        "torch._foreach_copy_ on CUDA",
        "core/module_state.py",
        "alike.setdefault((entry.tensor.device, entry.tensor.dtype), ([], []))",
        "alike.setdefault(entry.tensor.device, ([], []))",
        "core/test_cost.py::test_the_state_of_all_layers_is_replayed_by_a_few_kernels",
    ),
    Pitfall(
        "a compiled module writes its next pass over the loss that is kept, so the loss at theta + delta is logged",
        "CUDA graphs of torch.compile",
        "doors/attach.py",
        "self.loss = loss.detach().clone()",
        "self.loss = loss.detach()",
        "doors/test_attach.py::test_a_module_may_return_its_loss_in_the_same_memory_in_every_pass",
    ),
    Pitfall(
        "a gradient scaler makes the host wait for the overflow in a step that is captured in a CUDA graph",
        "torch.amp.GradScaler",
        "core/grad_scaler.py",
        "    return capturable or progress.moved",
        "    return progress.moved",
        "core/test_capture.py::test_a_gradient_scaler_asks_the_host_nothing_in_a_captured_step_of_an_attached_module",
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
