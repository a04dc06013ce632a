from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

from amp_plugin.data import DatasetSettings, ImageBatches, ImageSplit, collate
from amp_plugin.data.callback import EpochCallback
from amp_plugin.data.settings import SOURCES

N, CLASSES = 60, 10
SETTINGS = SOURCES["cifar10"].settings
assert isinstance(SETTINGS, DatasetSettings)


@pytest.fixture(scope="module")
def split() -> ImageSplit:
    rng = np.random.default_rng(0)
    return ImageSplit(rng.integers(0, 256, (N, 32, 32, 3), dtype=np.uint8), np.arange(N) % CLASSES)


def batches_of(split: ImageSplit, augment: Any = "autoaugment", **kwargs: Any) -> ImageBatches:
    return ImageBatches(split, SETTINGS, augment, **kwargs)


def by_sample(dataset: ImageBatches, order: list[int] | None = None, **kwargs: Any) -> Tensor:
    """Load every sample of an epoch (N, 3, H, W), and undo the loader's order."""
    order = order or list(range(N))
    loader = DataLoader(dataset, collate_fn=collate, sampler=order, **kwargs)
    images = torch.cat([batch["pixel_values"] for batch in loader])
    return images[torch.tensor(order).argsort()]


# --- items --------------------------------------------------------------------------------------------------


def test_a_list_of_indices_is_a_batch_and_one_index_a_sample(split: ImageSplit) -> None:
    dataset = batches_of(split)
    assert len(dataset) == N
    batch = dataset.__getitems__([7, 3, 7])
    assert batch["pixel_values"].shape == (3, 3, 32, 32)
    assert batch["pixel_values"].dtype == torch.float32
    assert batch["labels"].dtype == torch.int64
    assert batch["labels"].tolist() == [7, 3, 7]
    sample = dataset[3]
    assert torch.equal(sample["pixel_values"], batch["pixel_values"][1])
    assert sample["labels"].shape == ()
    assert int(sample["labels"]) == 3


def test_an_index_outside_the_data_set(split: ImageSplit) -> None:
    with pytest.raises(IndexError):
        batches_of(split)[N]


def test_collate_lets_batches_through_and_stacks_samples(split: ImageSplit) -> None:
    dataset = batches_of(split)
    batch = dataset.__getitems__([4, 9])
    assert collate(batch) is batch
    stacked = collate([dataset[4], dataset[9]])
    assert all(torch.equal(stacked[key], batch[key]) for key in ("pixel_values", "labels"))


def test_a_torch_subset_is_batched_too(split: ImageSplit) -> None:
    dataset = batches_of(split)
    (batch,) = DataLoader(Subset(dataset, [50, 2, 31]), batch_size=3, collate_fn=collate)
    assert torch.equal(batch["pixel_values"], dataset.__getitems__([50, 2, 31])["pixel_values"])


def test_evaluation_images_are_left_alone(split: ImageSplit) -> None:
    dataset = ImageBatches(split, SETTINGS)
    first = by_sample(dataset, batch_size=20)
    dataset.set_epoch(3)
    assert torch.equal(by_sample(dataset, batch_size=20), first)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (SETTINGS.mean, SETTINGS.std))
    pixels = torch.from_numpy(split.images).permute(0, 3, 1, 2) / 255
    torch.testing.assert_close(first, (pixels - mean) / std, rtol=1e-5, atol=1e-5)


# --- what the augmentation depends on -----------------------------------------------------------------------


@pytest.mark.parametrize("augment", ["plain", "cutout", "autoaugment"])
def test_same_for_any_workers_batch_size_and_order(split: ImageSplit, augment: Any) -> None:
    expected = by_sample(batches_of(split, augment), batch_size=N)
    shuffled = np.random.default_rng(1).permutation(N).tolist()
    for kwargs in ({"batch_size": 1}, {"batch_size": 7, "order": shuffled}):
        assert torch.equal(by_sample(batches_of(split, augment), **kwargs), expected)
    parallel = by_sample(batches_of(split, augment), batch_size=7, order=shuffled, num_workers=2)
    assert torch.equal(parallel, expected)


def test_samples_epochs_and_seeds_differ_and_an_epoch_comes_back(split: ImageSplit) -> None:
    one = ImageSplit(np.repeat(split.images[:1], N, axis=0), split.labels)
    dataset = batches_of(one, "plain", seed=1)
    epoch0 = by_sample(dataset, batch_size=N)
    assert len(torch.unique(epoch0, dim=0)) > N / 2  # one image has 81 windows and two sides
    dataset.set_epoch(1)
    epoch1 = by_sample(dataset, batch_size=N)
    assert (epoch0 != epoch1).flatten(1).any(dim=1).float().mean() > 0.9
    dataset.set_epoch(0)
    assert torch.equal(by_sample(dataset, batch_size=N), epoch0)
    assert torch.equal(by_sample(batches_of(one, "plain", seed=1), batch_size=N), epoch0)
    other_seed = by_sample(batches_of(one, "plain", seed=2), batch_size=N)
    assert (epoch0 != other_seed).flatten(1).any(dim=1).float().mean() > 0.9


def test_workers_that_live_on_see_the_epoch(split: ImageSplit) -> None:
    dataset = batches_of(split)
    loader = DataLoader(dataset, batch_size=16, collate_fn=collate, num_workers=2, persistent_workers=True)
    for epoch in (0, 1, 5, 1):
        dataset.set_epoch(epoch)
        parallel = torch.cat([batch["pixel_values"] for batch in loader])
        fresh = batches_of(split)
        fresh.set_epoch(epoch)
        assert torch.equal(parallel, by_sample(fresh, batch_size=N))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda dataset: pickle.loads(pickle.dumps(dataset))])
def test_a_copy_gives_the_same_batches(split: ImageSplit, duplicate: Any) -> None:
    dataset = batches_of(split, seed=5)
    dataset.set_epoch(2)
    assert torch.equal(duplicate(dataset)[11]["pixel_values"], dataset[11]["pixel_values"])


@pytest.mark.parametrize(
    ("seed", "epoch", "message"), [(-1, 0, "seed must lie in"), (0, -1, "epoch must not be negative, got -1")]
)
def test_negative_seed_or_epoch(split: ImageSplit, seed: int, epoch: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        batches_of(split, seed=seed).set_epoch(epoch)


# --- hosts --------------------------------------------------------------------------------------------------


class Recorder(nn.Module):
    """A small classifier that keeps what it is trained on."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(3 * 32 * 32, CLASSES)
        self.seen: list[Tensor] = []

    def forward(self, pixel_values: Tensor, labels: Tensor) -> dict[str, Tensor]:
        if self.training:
            self.seen.append(pixel_values.clone())
        logits = self.linear(pixel_values.flatten(1))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def trained(
    dataset: ImageBatches, folder: Path, *, resume: str | None = None, **kwargs: Any
) -> tuple[Recorder, dict[str, float]]:
    arguments: dict[str, Any] = {
        "num_train_epochs": 2,
        "per_device_train_batch_size": 16,
        "remove_unused_columns": False,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "seed": 7,
    }
    model, evaluated = Recorder(), ImageBatches(dataset.split, SETTINGS)
    trainer = Trainer(
        model,
        TrainingArguments(str(folder), **(arguments | kwargs)),
        train_dataset=dataset,
        eval_dataset=evaluated if dataset.device_batch is None else evaluated.to("cpu"),
        data_collator=collate,
        callbacks=[EpochCallback()],
    )
    trainer.train(resume_from_checkpoint=resume)
    return model, trainer.evaluate()


def test_trainer_sees_the_same_batches_with_workers_and_after_a_resume(split: ImageSplit, tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 6, "dataloader_num_workers": 0}
    whole, scores = trained(batches_of(split), tmp_path / "whole", **saving)
    assert len(whole.seen) == 8  # an epoch has four batches, and the last one has 12 images
    assert sum(map(len, whole.seen)) == 2 * N
    assert scores["eval_loss"] > 0
    first, second = torch.cat(whole.seen[:4]), torch.cat(whole.seen[4:])
    assert not any(torch.equal(a, b) for a in first for b in second)

    for persistent in (False, True):
        workers = {"dataloader_num_workers": 2, "dataloader_persistent_workers": persistent}
        parallel, _ = trained(batches_of(split), tmp_path / f"workers{persistent}", save_strategy="no", **workers)
        assert all(torch.equal(a, b) for a, b in zip(whole.seen, parallel.seen, strict=True))

    resumed, _ = trained(batches_of(split), tmp_path / "whole", resume=str(tmp_path / "whole" / "checkpoint-6"))
    assert len(resumed.seen) == 2
    assert all(torch.equal(a, b) for a, b in zip(whole.seen[6:], resumed.seen, strict=True))


def test_trainer_sees_the_same_batches_where_the_device_makes_them(split: ImageSplit, tmp_path: Path) -> None:
    whole, scores = trained(batches_of(split), tmp_path / "host", save_strategy="no")
    kwargs = {"save_strategy": "steps", "save_steps": 6, "dataloader_pin_memory": True}
    resident, same_scores = trained(batches_of(split).to("cpu"), tmp_path / "device", **kwargs)
    assert all(torch.equal(a, b) for a, b in zip(whole.seen, resident.seen, strict=True))
    assert same_scores["eval_loss"] == scores["eval_loss"]
    checkpoint = str(tmp_path / "device" / "checkpoint-6")
    resumed, _ = trained(batches_of(split).to("cpu"), tmp_path / "device", resume=checkpoint)
    assert len(resumed.seen) == 2
    assert all(torch.equal(a, b) for a, b in zip(whole.seen[6:], resumed.seen, strict=True))


def test_an_accelerate_loader_forwards_the_epoch(split: ImageSplit) -> None:
    dataset = batches_of(split)
    loader = Accelerator(cpu=True).prepare_data_loader(DataLoader(dataset, batch_size=N, collate_fn=collate))
    for epoch in (0, 1):
        (batch,) = loader
        fresh = batches_of(split)
        fresh.set_epoch(epoch)
        assert torch.equal(batch["pixel_values"], by_sample(fresh, batch_size=N))


def test_several_processes_share_an_epoch_with_the_callback(split: ImageSplit) -> None:
    def rank(index: int) -> Iterator[dict[str, Tensor]]:
        dataset = batches_of(split)
        loader = prepare_data_loader(
            DataLoader(dataset, batch_size=10, shuffle=True, collate_fn=collate),
            num_processes=2,
            process_index=index,
            use_seedable_sampler=True,
        )
        control, arguments = TrainerControl(), TrainingArguments("unused", use_cpu=True, report_to=[])
        EpochCallback().on_epoch_begin(arguments, TrainerState(epoch=3.0), control, train_dataloader=loader)
        return iter(loader)

    seen = torch.cat([batch["pixel_values"] for index in range(2) for batch in rank(index)])
    fresh = batches_of(split)
    fresh.set_epoch(3)
    expected = by_sample(fresh, batch_size=N)
    assert len(seen) == N
    assert {image.numpy().tobytes() for image in seen} == {image.numpy().tobytes() for image in expected}


def test_the_callback_leaves_other_data_sets_alone(split: ImageSplit) -> None:
    arguments = TrainingArguments("unused", use_cpu=True, report_to=[])
    loader = DataLoader([1, 2, 3])  # type: ignore[arg-type]
    EpochCallback().on_epoch_begin(arguments, TrainerState(), TrainerControl(), train_dataloader=loader)
    assert list(map(int, loader)) == [1, 2, 3]
