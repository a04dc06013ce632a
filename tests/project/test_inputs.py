"""Every option of every command, with inputs of its type and of others: INPUTS.md."""

from __future__ import annotations

import contextlib
import io
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from input_table import Endings, commands, endings, in_place, place, trainings
from option_inputs import OK, asked_for, ending, is_what_was_asked, name_of
from repository import RECORDS, ROOT
from transformers.utils import logging

from amp_plugin.train import job
from amp_plugin.train.ranges import RANGES

PAGE = RECORDS / "INPUTS.md"
TRAIN = trainings()
BY_NAME = {action.dest: action for action in TRAIN.actions}
NUMBERS = [name for name in RANGES if name in BY_NAME and name.startswith(("amp_", "lr_", "save_m", "mixup", "flood"))]
FEW = settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
RENAMED = {"sync_ascent": "amp_sync_ascent"}  # by the old name


@pytest.fixture(scope="module")
def found() -> Endings:
    """What comes of all inputs; an end in a traceback, without words or never is an error here."""
    return endings()


def test_an_input_is_taken_or_refused_in_one_line(found: Endings) -> None:
    outcomes = [end.outcome for command in found.values() for ends in command.values() for end in ends.values()]
    assert len(outcomes) >= 300
    assert not [line for line in outcomes if "\n" in line or not line]


def test_what_is_taken_is_what_was_asked_or_is_told(found: Endings) -> None:
    for name, command in commands().items():
        for action in command.actions:
            option = RENAMED.get(action.dest, action.dest)
            for words, end in found[name][name_of(action)].items():
                if end.outcome != OK or f"--{option} has no effect" in end.printed:
                    continue
                value = next(getattr(part, option) for part in end.configuration if hasattr(part, option))
                assert is_what_was_asked(value, asked_for(action, in_place(words))), words


@pytest.mark.slow
def test_the_record_is_what_is_found() -> None:
    """In a process of its own, for what other tests import changes a library's words.

    Of the options of transformers, those of another version are not compared.
    """
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, str(ROOT / "tests" / "helpers" / "input_table.py")]
    now = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=True
    ).stdout
    told, found = (dict(re.findall(r"^## (.*)\n\n((?:\|.*\n)+)", page, re.M)) for page in (PAGE.read_text(), now))
    for title, text in found.items():
        if title in told or "transformers" not in title:
            assert told[title] == text, "python tests/helpers/input_table.py > tests/records/INPUTS.md"


@given(name=st.sampled_from(sorted(BY_NAME)), text=st.text(st.characters(exclude_characters="\0"), max_size=20))
@FEW
def test_any_text_is_taken_or_refused_in_one_line(name: str, text: str) -> None:
    words = [f"--{name}={text}"]
    with place():
        end = ending(TRAIN, words, name)
    assert "\n" not in end.outcome
    if end.outcome == OK and BY_NAME[name].type is str:
        assert next(getattr(p, name) for p in end.configuration if hasattr(p, name)) in (text, [text])


@given(name=st.sampled_from(NUMBERS), value=st.floats())
@FEW
def test_any_number_is_taken_as_it_is_or_is_outside_the_range(name: str, value: float) -> None:
    whole = BY_NAME[name].type is int
    with place():
        end = ending(TRAIN, [f"--{name}={value!r}"], name)
    low = 1 if whole else 0
    inside = math.isfinite(value) and (value > low or (value == low and RANGES[name].startswith("[")))
    assert (end.outcome == OK) == (inside and not whole)
    if end.outcome == OK:
        assert getattr(end.configuration[2], name) == value


@pytest.mark.slow
@pytest.mark.usefixtures("no_pictures")
@pytest.mark.filterwarnings("ignore:.* is now .*; the old name goes:DeprecationWarning")  # old names are taken too
def test_what_is_taken_is_trained(found: Endings) -> None:
    """The first value that each option takes goes through a whole job; what is refused is refused before a step."""
    tiny = ["--train_images", "40", "--per_device_train_batch_size", "20", "--max_steps", "2", "--use_cpu", "true"]
    tiny += ["--model_kwargs", '{"width": 4, "layers": [1, 1, 1, 1]}', "--output_dir", "out", "--cpu_threads", "1"]
    trained, begun = 0, list[object]()
    for ends in found["train.py"].values():
        words = next((words for words, end in ends.items() if end.outcome == OK), None)
        if words is None or words[0].startswith(("--dry_run", "--output_dir")):
            continue
        with place(), contextlib.redirect_stdout(io.StringIO()):
            try:
                job.main([*tiny, *in_place(words)])
                trained += 1
            except TRAIN.mistakes:
                begun += [words for name in ("metrics.jsonl", "model.safetensors") if Path("out", name).exists()]
            finally:
                torch.use_deterministic_algorithms(False)
                logging.set_verbosity_warning()
    assert not begun
    assert trained > 100
