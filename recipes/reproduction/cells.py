"""The cells of a sweep: which runs there are, in which order, and what each tells train.py."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from amp_plugin.arguments import different
from reproduction.published import Setting, methods, published
from reproduction.scale import Scale


@dataclass(frozen=True)
class Cell:
    """One run."""

    setting: Setting
    method: str  # name in methods.yaml
    seed: int
    values: dict[str, Any] = field(default_factory=dict)  # hyper-parameters beyond the method's and the scale's own
    trial: bool = False  # whether the run helps to choose hyper-parameters, on held-out training images

    def options(self, scale: Scale) -> dict[str, Any]:
        """Return all that train.py is told about the training, by option."""
        model = published().models[self.setting.model]
        options = {**scale.options, **methods()[self.method].options, **self.values}
        kwargs = dict(scale.models[self.setting.model])
        if "dropout" in options:
            kwargs[model.dropout] = options.pop("dropout")
        options["num_train_epochs"] *= options.pop("epochs_times", 1)
        if self.trial and scale.tuning is not None:
            options["validation_images"] = scale.tuning.validation_images
        about = {"dataset": self.setting.dataset, "model": model.architecture, "model_kwargs": kwargs}
        return {**about, "augment": self.setting.augment, "seed": self.seed, **options}

    def name(self, scale: Scale) -> str:
        """Return the name of a folder, which can be read and differs where the options differ."""
        said = json.dumps([self.options(scale), scale.train_args], sort_keys=True)
        setting = self.setting
        parts = (setting.dataset, setting.model, setting.augment, self.method, f"seed{self.seed}")
        digest = hashlib.sha256(said.encode()).hexdigest()[:8]
        return f"{'validation-' if self.trial else ''}{'-'.join(parts)}-{digest}"

    def __str__(self) -> str:
        """Describe the run in a line."""
        said = ", ".join(
            f"{name} {value:g}" if isinstance(value, float | int) else f"{name} {value}"
            for name, value in self.values.items()
        )
        where = f"{self.setting.dataset} {self.setting.model} {self.setting.augment}"
        return f"{self.method}{f' ({said})' if said else ''}, {where}, seed {self.seed}"


@dataclass(frozen=True)
class Selection:
    """Which cells of a scale are meant; None is all that the scale has."""

    scale: Scale
    models: Sequence[str] | None = None
    datasets: Sequence[str] | None = None
    augmentations: Sequence[str] | None = None
    methods: Sequence[str] | None = None
    seeds: Sequence[int] | None = None

    def __post_init__(self) -> None:
        """Check the names."""
        for kind, option in {"models": "models", "datasets": "datasets", "augmentations": "augment"}.items():
            has = getattr(self.scale, kind)
            if unknown := [name for name in getattr(self, kind) or () if name not in has]:
                raise ValueError(
                    f"--{option} {' '.join(unknown)}: the scale {self.scale.name} has no such; it has {', '.join(has)}"
                )
            different(getattr(self, kind), f"--{option}")
        different(self.methods, "--methods")
        different(self.seeds, "--seeds")
        if unknown := [name for name in self.methods or () if name not in methods()]:
            raise ValueError(f"--methods {' '.join(unknown)}: unknown; there are {', '.join(methods())}")
        if not self.settings():
            raise ValueError("the paper trains none of these models with this augmentation")

    def settings(self) -> list[Setting]:
        """Return the chosen settings; at the published hyper-parameters, only those that the paper has."""
        has = self.scale
        names = self.models or has.models, self.augmentations or has.augmentations, self.datasets or has.datasets
        settings = [Setting(*chosen) for chosen in product(*names)]
        return settings if has.tuning is not None else [s for s in settings if s in published().results]

    def methods_of(self, setting: Setting) -> list[str]:
        """Return the chosen methods, in the order of methods.yaml."""
        wanted = self.methods or self.scale.methods or list(published().results[setting])
        return [name for name in methods() if name in wanted]

    def runs(self) -> list[Cell]:
        """Return the runs that are reported: seed by seed, method by method."""
        settings = self.settings()
        cells = {
            (seed, method, setting): _values(self.scale, setting, method)
            for seed in self.seeds or self.scale.seeds
            for method in methods()
            for setting in settings
            if method in self.methods_of(setting)
        }
        missing = {f"{method} on {setting.dataset}" for (_, method, setting), found in cells.items() if found is None}
        if missing:
            raise ValueError(
                f"{self.scale.chosen_path} has no hyper-parameters for {', '.join(sorted(missing))}: run --tune, then"
                " --choose; or name other --methods"
            )
        return [Cell(setting, method, seed, values or {}) for (seed, method, setting), values in cells.items()]

    def trials(self) -> list[Cell]:
        """Return the runs that choose hyper-parameters, method by method."""
        tuning = self.scale.tuning
        if tuning is None:
            raise ValueError(f"the scale {self.scale.name} takes the published hyper-parameters; it has no trials")
        return [
            Cell(setting, method, tuning.seed, values, trial=True)
            for method in methods()
            for setting in self.settings()
            if setting.dataset not in tuning.carried and method in self.methods_of(setting)
            for values in tuning.trials.get(method, [])
        ]


def _values(scale: Scale, setting: Setting, method: str) -> dict[str, Any] | None:
    """Return the hyper-parameters of a run that is reported; None if they have yet to be chosen."""
    if scale.tuning is not None:
        setting = setting._replace(dataset=scale.tuning.carried.get(setting.dataset, setting.dataset))
        found = [scale.chosen.get(setting, {}).get(source) for source in methods()[method].sources]
        values = {name: value for some in found if some for name, value in some.items()}
        return None if None in found else values
    return published().perturbation[setting.model][setting.augment] if method == "amp" else {}


def tunable(scale: Scale, method: str) -> list[str]:
    """Return the names of the hyper-parameters in which runs of one method may differ."""
    fixed = ("optim", "epochs_times", "amp_ascent", "amp_batch_norm")
    own = [name for name in methods()[method].options if name not in fixed]
    if method == "amp":
        own += ["amp_epsilon", "amp_inner_lr"]
    tried = scale.tuning.trials if scale.tuning else {}
    trials = [trial for source in methods()[method].sources for trial in tried.get(source, [])]
    return list(dict.fromkeys([*own, *(name for trial in trials for name in trial)]))
