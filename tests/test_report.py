from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from amp_plugin.provenance import run_record
from amp_plugin.report import append_to_ledger, plot_curves, series, table

RECORDS = [
    {"epoch": 1.0, "loss": 2.0, "amp_loss": 2.5, "learning_rate": 0.1},
    {"epoch": 1.0, "eval_loss": 1.9, "eval_error": 60.0},
    {"epoch": 2.0, "loss": 1.0, "amp_loss": 1.2, "learning_rate": 0.01},
    {"epoch": 2.0, "eval_loss": 1.5, "eval_error": 50.0},
]


def test_series_takes_what_is_logged() -> None:
    assert series(RECORDS, "loss") == ([1.0, 2.0], [2.0, 1.0])
    assert series(RECORDS, "sharpness") == ([], [])


def test_the_table_is_aligned() -> None:
    lines = table({"train loss": "0.1", "time": "12 s"}).splitlines()
    assert {len(line) for line in lines} == {len("train loss  12 s")}
    assert lines[2] == "time        12 s"


def test_curves_have_a_line_for_each_logged_quantity(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="draws the training curves")
    with_amp, without = tmp_path / "amp.png", tmp_path / "sgd.png"
    plot_curves(RECORDS, with_amp, "run")
    plot_curves([{k: v for k, v in r.items() if k != "amp_loss"} for r in RECORDS], without, "run")
    with Image.open(with_amp) as a, Image.open(without) as b:
        orange = (213, 94, 0)
        assert orange in {c for _, c in a.convert("RGB").getcolors(1 << 24)}
        assert orange not in {c for _, c in b.convert("RGB").getcolors(1 << 24)}


def test_the_ledger_grows_by_one_line_a_run(tmp_path: Path) -> None:
    ledger = tmp_path / "new" / "ledger.jsonl"
    for seed in (1, 2):
        append_to_ledger(ledger, run_record({"seed": seed, "folder": tmp_path}, {"error": 3.0}))
    records = [json.loads(line) for line in ledger.read_text().splitlines()]
    assert [r["settings"]["seed"] for r in records] == [1, 2]
    assert records[0]["metrics"] == {"error": 3.0}
    assert {"torch", "timm", "transformers"} <= records[0]["versions"].keys()
