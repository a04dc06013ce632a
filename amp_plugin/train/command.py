"""The command that repeats a run of the main job."""

from __future__ import annotations

import shlex

from amp_plugin.train.options import ELSEWHERE
from amp_plugin.train.recipe_file import recipe_options

# Beginnings of further options that do not decide the outcome; some hold a token, or folders of the machine.
_PRIVATE = ("hub", "push_to_hub", "output_dir", "logging_dir", "run_name", "disable_tqdm")
_LINE = 100


def command_line(argv: list[str], processes: int) -> str:
    """A command that repeats a run anywhere: with the settings of its recipe file, without folders and tokens.

    Args:
        argv: the job's arguments: perhaps a recipe, then options.
        processes: of the run.
    """
    if argv and not argv[0].startswith("-"):
        argv = [*recipe_options(argv[0]), *argv[1:]]
    words: list[str] = []
    for word in argv:  # --name=value is --name value
        name, equals, value = word.partition("=")
        words += [name, value] if equals and name.startswith("--") else [word]
    options: dict[str, list[str]] = {}  # the last one of a name wins, as in argparse
    for word in words:
        if word.startswith("--"):
            name = word[2:].replace("-", "_")
            options[name] = []
        elif options:
            options[name].append(word)
    kept = {n: v for n, v in options.items() if n == "fast" or not (n in ELSEWHERE or n.startswith(_PRIVATE))}
    launcher = ["torchrun", "--nproc_per_node", str(processes)] if processes > 1 else ["python"]
    parts = [[*launcher, "-m", "amp_plugin.train"], *([f"--{name}", *values] for name, values in kept.items())]
    whole = " ".join(map(shlex.join, parts))
    return whole if len(whole) <= _LINE else " \\\n    ".join(map(shlex.join, parts))
