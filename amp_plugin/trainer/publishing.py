"""`PublishingMixin`: pushes to the Hub that are checked before the training, have a true card, and hold no pickles."""

from __future__ import annotations

import dataclasses
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo
from transformers import PreTrainedModel
from transformers.modelcard import TASK_MAPPING, TrainingSummary, _get_mapping_values
from transformers.trainer_utils import HubStrategy
from transformers.utils import logging
from transformers.utils.hub import PushInProgress
from transformers.utils.import_utils import is_peft_available

from amp_plugin.doors.trainer_mixin import TrainerMixin
from amp_plugin.hub.access import require_write_access
from amp_plugin.hub.card import PLACEHOLDER, Run, RunData, model_card, pictures_in
from amp_plugin.hub.upload import upload, upload_later
from amp_plugin.whole_file import whole_file

logger = logging.get_logger(__name__)


class PublishingMixin(TrainerMixin):
    """A ``push_to_hub`` of any `transformers.Trainer` that cannot lose a training.

    The mixin stands before the Trainer: ``class MyTrainer(PublishingMixin, Trainer)``. A repository that cannot be
    written to is an error when the Trainer is made. A push holds the weights (as safetensors, which timm opens too if
    the model is timm's), the configuration, the card and other files of the output folder, but no pickles. With
    ``hub_strategy`` ``checkpoint`` or ``all_checkpoints`` the training's state, which PyTorch pickles, is pushed too.
    A push during the training that fails is logged; a push at the end that fails raises.

    Raises:
        HubError: ``push_to_hub`` is on, but the repository cannot be written to.
    """

    hub_model_id: Any
    push_in_progress: Any

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Make the repository if need be, and require that it can be written to."""
        if self.is_world_process_zero():
            self.hub_model_id = require_write_access(
                self.args.hub_model_id or Path(str(self.args.output_dir)).absolute().name,
                token=token or self.args.hub_token,
                private=self.args.hub_private_repo if private is None else private,
            )
            self.push_in_progress = PushInProgress()

    def push_to_hub(  # type: ignore[override]
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> CommitInfo | Future[CommitInfo | None] | None:
        """Save the model, write its card and push the output folder; every process has to call this method.

        The arguments are those of the stock Trainer, whose further ones go to `create_model_card`. `private` is whether
        a repository that has to be made is private.

        Returns:
            The commit; with ``blocking=False`` a future of the commit; None in all processes but the first.

        Raises:
            HubError: The folder cannot be pushed; the message names the command that repeats the push.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self.create_model_card(**kwargs)
        self._finish_current_push()
        target: dict[str, Any] = {
            "token": token or self.args.hub_token,
            "revision": revision or self.args.hub_revision,
            "commit_message": commit_message or "End of training",
        }
        folder = Path(str(self.args.output_dir))
        if not blocking:
            return upload_later(folder, str(self.hub_model_id), logger.warning, **target)
        return upload(folder, str(self.hub_model_id), **target)

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
    ) -> None:
        """Write the card to ``README.md`` in the output folder; the arguments are those of the stock Trainer."""
        if not self.is_world_process_zero():
            return
        folder = Path(str(self.args.output_dir))
        repo_id = self.hub_model_id or self.args.hub_model_id
        base = finetuned_from or _base_model(self.model)
        name = model_name or (repo_id or folder.absolute().name).split("/")[-1]
        tag, config = _first(dataset_tags), _first(dataset_args)
        data = _first(dataset) or tag
        run = Run(
            **_described(self.model),
            name=name,
            repo_id=repo_id if repo_id and "/" in repo_id else PLACEHOLDER,
            task=_first(tasks) or _task(self.model),
            data=RunData(name=data, id=tag or data, on_hub=tag is not None, config=config) if data else None,
            metrics=_last_metrics(self.state.log_history),
            base_model=base,
            license=TrainingSummary(model_name=name, license=license, finetuned_from=base).license,
            language=language,
            tags=[tags] if isinstance(tags, str) else tags or [],
            pictures=pictures_in(folder),
        )
        folder.mkdir(parents=True, exist_ok=True)
        card = model_card(dataclasses.replace(run, **self.training_for_card()))
        with whole_file(folder / "README.md") as new:
            card.save(new)

    def training_for_card(self) -> dict[str, Any]:
        """Return fields of :class:`amp_plugin.hub.Run` that the card shows instead of what the Trainer knows.

        A Trainer that knows its optimizer overrides this method to return ``optimizer``, ``uses_amp`` and ``settings``.
        """
        return {}

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        strategy = self.args.hub_strategy
        if not self.is_world_process_zero() or strategy == HubStrategy.END:
            return
        if not (self.push_in_progress.is_done() or self.args.hub_always_push):
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        folder = Path(checkpoint_folder)
        message = f"Training in progress, step {self.state.global_step}"
        pushes: list[dict[str, Any]] = [{"commit_message": message}]
        if strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            where = "last-checkpoint" if strategy == HubStrategy.CHECKPOINT else folder.name
            pushes.append({"commit_message": f"{message}, checkpoint", "path_in_repo": where, "complete": True})
        target = {"token": self.args.hub_token, "revision": self.args.hub_revision}
        jobs = [upload_later(folder, str(self.hub_model_id), _go_on, **target, **push) for push in pushes]
        self.push_in_progress.jobs = [job for job in [*self.push_in_progress.jobs, *jobs] if not job.done()]


def _go_on(problem: str) -> None:
    logger.warning(f"{problem} The training goes on, and pushes again later.")


def _described(model: Any) -> dict[str, Any]:
    """Return the library that opens the model, the library's name for the architecture, and the model's size."""
    parameters = sum(p.numel() for p in model.parameters())
    if is_peft_available():
        from peft import PeftModel

        if isinstance(model, PeftModel):
            return {"library": "peft", "architecture": type(model).__name__, "parameters": parameters}
    if getattr(getattr(model, "config", None), "model_type", None) == "timm_wrapper":
        return {"library": "timm", "architecture": model.config.architecture, "parameters": parameters}
    library = "transformers" if isinstance(model, PreTrainedModel) else None
    return {"library": library, "architecture": type(model).__name__, "parameters": parameters}


def _base_model(model: Any) -> str | None:
    """Return the name of the model on the Hub that this model was loaded from; None if it was loaded from none."""
    name = str(getattr(getattr(model, "config", None), "_name_or_path", None) or "")
    return None if name in ("", "None") or Path(name).exists() else name


def _task(model: Any) -> str | None:
    tasks = (task for task, names in TASK_MAPPING.items() if type(model).__name__ in _get_mapping_values(names))
    return next(tasks, None)


def _last_metrics(records: list[dict[str, Any]]) -> dict[str, float]:
    """Return the metrics of the last evaluation, without the prefix ``eval_``."""
    last: dict[str, Any] = next((r for r in reversed(records) if "eval_loss" in r), {})
    numbers = {k: v for k, v in last.items() if k.startswith("eval_") and isinstance(v, (int, float))}
    return {k.removeprefix("eval_"): v for k, v in numbers.items() if not k.endswith(("_runtime", "_per_second"))}


def _first(value: str | list[str] | None) -> str | None:
    return value[0] if isinstance(value, list) and value else value if isinstance(value, str) else None
