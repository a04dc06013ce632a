from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from checkpoints import bert_checkpoint
from torch.utils.data import DataLoader
from transformers import AutoTokenizer

from amp_plugin.data import DatasetError, TextBatches, TextData, collate, load_texts

ROWS = {
    "premise": ["the film was good", "the plot was", "film", "the film was bad"],
    "claim": ["good", "the plot was poor", "fine film", "the"],
    "verdict": [0, 1, 1, 0],
}


def load(folder: Path, rows: dict[str, list[Any]], **kwargs: Any) -> TextData:
    """Write the rows as JSON Lines, both splits alike, and load them."""
    (folder / "rows").mkdir(exist_ok=True)
    for split in ("train", "test"):
        datasets.Dataset.from_dict(rows).to_json(str(folder / "rows" / f"{split}.jsonl"))
    names = {"text_column": "premise", "label_column": "verdict", "cache_dir": folder / "cache"}
    return load_texts(str(folder / "rows"), **(names | kwargs))


def test_batches_are_what_the_tokenizer_makes(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(bert_checkpoint(tmp_path / "bert"))
    data = load(tmp_path, ROWS, text_pair_column="claim")
    assert data.class_names == ("0", "1")
    loader = DataLoader(TextBatches(data.train, tokenizer, max_length=7), batch_size=3, collate_fn=collate)
    first, second = list(loader)
    expected = tokenizer(ROWS["premise"][:3], ROWS["claim"][:3], truncation=True, max_length=7, padding=True)
    assert first["input_ids"].tolist() == expected["input_ids"]
    assert first["attention_mask"].tolist() == expected["attention_mask"]
    assert first["input_ids"].shape == (3, 7)
    assert (first["labels"].tolist(), second["labels"].tolist()) == ([0, 1, 1], [0])
    one = TextBatches(data.train, tokenizer, max_length=16)[3]
    assert one["input_ids"].tolist() == tokenizer(ROWS["premise"][3], ROWS["claim"][3])["input_ids"]
    assert torch.equal(one["labels"], torch.tensor(0))


def test_a_part_has_equally_many_of_every_class(tmp_path: Path) -> None:
    train = load(tmp_path, {name: values * 5 for name, values in ROWS.items()}).train
    rest, held_out = train.split(6)
    assert np.bincount(held_out.labels).tolist() == [3, 3]
    assert np.bincount(rest.labels).tolist() == [7, 7]
    assert held_out.texts.shape == (6, 1)
    with pytest.raises(DatasetError, match="cannot take 21 of 20 texts"):
        train.subset(21)


@pytest.mark.parametrize(
    ("change", "kwargs", "message"),
    [
        ({"premise": [1, 2, 3, 4]}, {}, r"column 'premise' holds Value\('int64'\), not texts; .* text_column"),
        ({"premise": ["a", None, "b", "c"]}, {}, r"1 texts of column 'premise' are missing, the first in row 1; drop"),
        ({}, {"text_pair_column": "proof"}, r"no column 'proof', only premise, claim, verdict; .* text_pair_column"),
        ({"verdict": ["x"] * 4}, {}, r"column 'verdict' has one class only, x"),
        ({}, {"test_split": "exam"}, r"split 'exam' is missing, there are train, test"),
    ],
)
def test_what_does_not_fit(tmp_path: Path, change: dict[str, Any], kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        load(tmp_path, ROWS | change, **kwargs)
