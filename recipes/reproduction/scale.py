"""The scale of a sweep: how large the networks are and how long they train, from a YAML file such as cpu.yaml."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import MISSING, dataclass, field, fields
from itertools import product
from operator import itemgetter
from pathlib import Path
from typing import Any, get_type_hints

from amp_plugin.arguments import Parser, different, number
from reproduction.plain import check_type, read_yaml
from reproduction.published import HERE, Setting, by_setting, methods, published

PAPER = "paper"  # the scale at which the published figures are comparable
_Chosen = dict[str, dict[str, dict[str, dict[str, dict[str, Any]]]]]  # by model, augmentation, data set and method
# A cell has values of its own for these options of train.py, and a sweep for the others.
_OF_CELLS = ("augment", "dataset", "model", "model_kwargs", "seed", "validation_images")
_OF_SWEEPS = ("data_root", "ledger", "output_dir", "resume_from_checkpoint", "save_total_limit")


@dataclass(frozen=True)
class Tuning:
    """How hyper-parameters are chosen."""

    validation_images: int  # number of training images that are held out, and decide
    seed: int  # seed of the trials
    trials: dict[str, list[dict[str, Any]]]  # values to try, by method; as many for each
    carried: dict[str, str] = field(default_factory=dict)  # by data set without trials, the one whose values it takes


@dataclass(frozen=True)
class Scale:
    """What all cells of a sweep have in common."""

    path: Path  # the YAML file, whose name without its ending is that of the scale
    models: dict[str, dict[str, Any]]  # arguments of each network, by the paper's names of them
    datasets: list[str]  # data sets to train on
    augmentations: list[str]  # as train.py calls them
    seeds: list[int]  # seeds of the runs that are reported
    options: dict[str, Any]  # options of train.py
    launch: list[str]  # arguments of ``accelerate launch``
    methods: list[str] | None = None  # methods to compare; None for those that are published for a cell
    tuning: Tuning | None = None  # None if the published hyper-parameters are taken
    chosen: dict[Setting, dict[str, dict[str, Any]]] = field(default_factory=dict)  # from `chosen_path`, by method
    train_args: list[str] = field(default_factory=list)  # further arguments of train.py, from the command line
    like: str | None = None  # name of the scale that this one is like, beside which its table stands

    @property
    def name(self) -> str:
        """The name of the file, without its ending."""
        return self.path.stem

    @property
    def chosen_path(self) -> Path:
        """The file with the chosen hyper-parameters, beside the scale's."""
        return self.path.with_name(f"{self.name}_chosen.yaml")


def read_scale(name: str) -> Scale:
    """Read a scale that comes with the recipes, or a YAML file, and what was chosen for it.

    A file with ``like: NAME`` has the keys of that scale, but for those that the file gives; options and arguments of a
    model are replaced one by one. What was chosen for that scale is taken too, but for the options that the file gives.

    Raises:
        ValueError: There is no such scale, or something in it cannot be meant.
    """
    path = HERE / f"{name}.yaml" if (HERE / f"{name}.yaml").is_file() else Path(name)
    if not path.is_file():
        raise ValueError(f"--scale {name!r} is neither paper nor cpu nor a YAML file")
    data, base, given = read_yaml(path), None, dict[str, Any]()
    if isinstance(data, dict) and "like" in data:
        given = data.get("options") or {}
        base, data = _based(path, data)
    data = _checked(data, Scale, f"{path}: a scale", {"path", "chosen", "train_args", "like"})
    if data.get("tuning") is not None:
        data["tuning"] = Tuning(**_checked(data["tuning"], Tuning, f"{path}: tuning"))
    scale = Scale(path=path, like=base.name if base else None, **data)
    _check(scale)
    if base is not None:
        for setting, by_method in base.chosen.items():
            scale.chosen[setting] = {m: {n: v for n, v in vs.items() if n not in given} for m, vs in by_method.items()}
    if scale.chosen_path.is_file():
        for setting, by_method in by_setting(read_chosen(scale.chosen_path), itemgetter("values")).items():
            scale.chosen.setdefault(setting, {}).update(by_method)
    return scale


def _based(path: Path, own: dict[str, Any]) -> tuple[Scale, dict[str, Any]]:
    """Return the scale that a file is like, and the keys of both."""
    like, own = own["like"], {key: value for key, value in own.items() if key != "like"}
    base = HERE / f"{like}.yaml"
    if not base.is_file() or "like" in (data := read_yaml(base)):
        raise ValueError(f"{path}: like names a scale that comes with the recipes and is like no other, got {like!r}")
    models, options, names = (own.get(key, data[key]) for key in ("models", "options", "datasets"))
    check_type(models, dict[str, dict[str, Any]], f"{path}: models")
    check_type(options, dict[str, Any], f"{path}: options")
    check_type(names, list[str], f"{path}: datasets")
    own["models"] = {name: {**data["models"].get(name, {}), **arguments} for name, arguments in models.items()}
    own["options"] = {**data["options"], **options}
    if carried := (data.get("tuning") or {}).get("carried"):
        carried = {to: of for to, of in carried.items() if to in names}
        data["tuning"] = {**data["tuning"], "carried": carried}
    return read_scale(str(like)), {**data, **own}


def read_chosen(path: Path) -> _Chosen:
    """Read a scale's file of chosen values, which may have none yet.

    Raises:
        ValueError: The file is not such a one.
    """
    data: _Chosen = read_yaml(path) or {}
    try:
        check_type(data, _Chosen, "the file")
        for setting, entries in by_setting(data, lambda entry: entry.get("values")).items():
            for method, values in entries.items():
                check_type(values, dict[str, Any], f"values of {method} on {setting.dataset}")
    except ValueError as error:
        raise ValueError(f"{path}: {error}; mend it, or delete it and run --choose again") from None
    return data


def check_train_args(words: list[str]) -> None:
    """Raise a ValueError if further arguments of train.py set what the cells or the sweep set."""
    names = {word[2:].partition("=")[0].replace("-", "_") for word in words if word.startswith("--")}
    _leave_to_cells("--train_args", names)


def processes(launch: list[str]) -> int:
    """Return the number of processes that these arguments of ``accelerate launch`` ask for."""
    parser = Parser(add_help=False)
    parser.add_argument("--num_processes", "--num-processes", type=number(int, "[1, inf)"), default=1)
    try:
        return int(parser.parse_known_args(launch)[0].num_processes)
    except ValueError as error:
        raise ValueError(f"launch: {error}") from None


def _checked(data: Any, kind: Any, name: str, apart: Collection[str] = ()) -> dict[str, Any]:
    """Return a mapping as a file has it, whose keys and types are those of a dataclass."""
    known = {f.name: f for f in fields(kind) if f.name not in apart}
    needed = [f.name for f in known.values() if f.default is MISSING and f.default_factory is MISSING]
    if not isinstance(data, dict) or not set(needed) <= data.keys() <= known.keys():
        rest = known.keys() - needed
        raise ValueError(f"{name} names {', '.join(sorted(needed))}, and {' and '.join(sorted(rest))} if it likes")
    hints = get_type_hints(kind) | {"tuning": Any}  # which is another such mapping
    for key, value in data.items():
        check_type(value, hints[key], f"{name.removesuffix(' a scale')} {key}")
    return dict(data)


def _leave_to_cells(where: str, names: Collection[str]) -> None:
    if own := sorted({*_OF_CELLS, *_OF_SWEEPS}.intersection(names)):
        raise ValueError(f"{where}: {', '.join(own)} differ from cell to cell; leave that to the sweep")


def _check(scale: Scale) -> None:
    """Raise a ValueError where something in a scale cannot be meant."""
    trials = scale.tuning.trials if scale.tuning else {}
    for kind, named, known in (
        ("model", scale.models, published().models),
        ("method", [*(scale.methods or ()), *trials], methods()),
    ):
        if unknown := [name for name in named if name not in known]:
            raise ValueError(f"{scale.path}: unknown {kind} {', '.join(unknown)}; there are {', '.join(known)}")
    for key in ("models", "datasets", "augmentations", "seeds"):
        if not getattr(scale, key):
            raise ValueError(f"{scale.path}: {key} is empty")
        different(list(getattr(scale, key)), f"{scale.path}: {key}")
    epochs = scale.options.get("num_train_epochs")
    if not isinstance(epochs, (int, float)) or isinstance(epochs, bool):
        raise ValueError(f"{scale.path}: options must have num_train_epochs, a number, got {epochs!r}")
    try:
        _leave_to_cells("options", {name.replace("-", "_") for name in scale.options})
        processes(scale.launch)
    except ValueError as error:
        raise ValueError(f"{scale.path}: {error}") from None
    if scale.tuning:
        if not trials or not scale.methods:
            raise ValueError(f"{scale.path}: a scale with tuning names its methods, and trials of each")
        counts = {name: len(some) for name, some in trials.items()}
        if len(set(counts.values())) > 1:
            raise ValueError(f"{scale.path}: every method needs the same number of trials, got {counts}")
        if strange := scale.tuning.carried.items() - set(product(scale.datasets, scale.datasets)):
            raise ValueError(
                f"{scale.path}: carried names data sets of the scale, {', '.join(scale.datasets)}; got {dict(strange)}"
            )
        if scale.tuning.seed in scale.seeds:
            raise ValueError(f"{scale.path}: the seed of the trials, {scale.tuning.seed}, is among those reported")
