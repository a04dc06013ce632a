"""Small checkpoints to fine-tune, made here because no test may reach the Hub, and texts for them."""

from __future__ import annotations

import csv
import random
from pathlib import Path

import timm
import torch
from timm.models import save_for_hf
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    DistilBertConfig,
    DistilBertForMaskedLM,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

TEXTS = {"pos": ("good", "fine", "great"), "neg": ("bad", "poor", "awful")}
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "film", "plot", "was", *TEXTS["pos"], *TEXTS["neg"]]


def timm_checkpoint(folder: Path) -> Path:
    """timm's own layout, as on the Hub: timm's smallest ResNet with seven classes."""
    torch.manual_seed(1)
    save_for_hf(timm.create_model("test_resnet", num_classes=7), folder, safe_serialization=True)
    return folder


def vit_checkpoint(folder: Path) -> Path:
    """A ViT for images of 48 pixels, with five classes."""
    torch.manual_seed(1)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    ViTForImageClassification(ViTConfig(**sizes, image_size=48, patch_size=16, num_labels=5)).save_pretrained(folder)
    ViTImageProcessor(size={"height": 48, "width": 48}).save_pretrained(folder)
    return folder


def bert_checkpoint(folder: Path) -> Path:
    """A DistilBERT as it comes from pretraining, without a classifier, and its tokenizer."""
    torch.manual_seed(1)
    vocabulary = {word: i for i, word in enumerate(VOCABULARY)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=16, **special).save_pretrained(folder)
    sizes = {"dim": 32, "n_layers": 1, "n_heads": 2, "hidden_dim": 64, "max_position_embeddings": 16}
    DistilBertForMaskedLM(DistilBertConfig(vocab_size=len(vocabulary), **sizes)).save_pretrained(folder)
    return folder


def reviews(folder: Path) -> Path:
    """CSV files of short texts with their mood in words."""
    folder.mkdir()
    draw = random.Random(0)
    for split, rows in (("train", 80), ("test", 30)):
        with (folder / f"{split}.csv").open("w", newline="") as file:
            table = csv.writer(file)
            table.writerow(["text", "mood", "stars"])
            for i in range(rows):
                mood = ("neg", "pos")[i % 2]
                text = f"the {draw.choice(('film', 'plot'))} was {draw.choice(TEXTS[mood])}"
                table.writerow([text, mood, 1 + 4 * (i % 2)])
    return folder
