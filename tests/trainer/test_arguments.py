from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import HfArgumentParser

from amp_plugin import AMPTrainingArguments


@pytest.mark.parametrize("door", ["keyword", "command line", "JSON"])
def test_the_old_name_of_amp_sync_ascent_still_works(tmp_path: Path, door: str) -> None:
    parser = HfArgumentParser(AMPTrainingArguments)  # type: ignore[arg-type]
    (tmp_path / "args.json").write_text(json.dumps({"output_dir": str(tmp_path), "sync_ascent": False}))
    doors: dict[str, Callable[[], Any]] = {
        "keyword": lambda: AMPTrainingArguments(str(tmp_path), sync_ascent=False),
        "command line": lambda: parser.parse_args_into_dataclasses(
            ["--output_dir", str(tmp_path), "--sync_ascent", "false"]
        )[0],
        "JSON": lambda: parser.parse_json_file(tmp_path / "args.json")[0],
    }
    with pytest.warns(DeprecationWarning, match="sync_ascent is now amp_sync_ascent"):
        args = doors[door]()
    assert args.amp_sync_ascent is False
    assert replace(args, amp_sync_ascent=True).amp_sync_ascent, "the old name is not applied again"
