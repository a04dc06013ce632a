"""Publish trained models on the Hugging Face Hub, for timm and transformers alike, with a model card."""

from __future__ import annotations

from amp_plugin.hub.access import HubError, require_write_access
from amp_plugin.hub.card import Run, RunData, model_card
from amp_plugin.hub.upload import push, push_folder

__all__ = ["HubError", "Run", "RunData", "model_card", "push", "push_folder", "require_write_access"]
