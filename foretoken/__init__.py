"""foretoken: train language models that predict the next n tokens, and decode with them, faster and unchanged."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from foretoken.attach import attach_heads
    from foretoken.checkpoint import load_checkpoint as load
    from foretoken.checkpoint import save_checkpoint as save
    from foretoken.completion import Generation, generate, stream
    from foretoken.config import ModelConfig, Recipe
    from foretoken.errors import CheckpointError, ConfigError, DataError, ForetokenError, TrainingError
    from foretoken.formats.hf_class import register_transformers
    from foretoken.loss import mtp_loss, oracle_loss, scales, targets, valid_counts
    from foretoken.model import Model
    from foretoken.recipe import load_recipe
    from foretoken.tokenizer import Tokenizer

# Public name -> where it is. Imported on first use, so that `import foretoken` and `foretoken --help` are instant.
_PUBLIC = {
    **dict.fromkeys(("CheckpointError", "ConfigError", "DataError", "ForetokenError", "TrainingError"), "errors"),
    **dict.fromkeys(("Generation", "generate", "stream"), "completion"),
    **dict.fromkeys(("mtp_loss", "oracle_loss", "scales", "targets", "valid_counts"), "loss"),
    **dict.fromkeys(("ModelConfig", "Recipe"), "config"),
    "Model": "model",
    "Tokenizer": "tokenizer",
    "attach_heads": "attach",
    "load": "checkpoint:load_checkpoint",
    "load_recipe": "recipe",
    "register_transformers": "formats.hf_class",
    "save": "checkpoint:save_checkpoint",
}

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DataError",
    "ForetokenError",
    "Generation",
    "Model",
    "ModelConfig",
    "Recipe",
    "Tokenizer",
    "TrainingError",
    "attach_heads",
    "generate",
    "load",
    "load_recipe",
    "mtp_loss",
    "oracle_loss",
    "register_transformers",
    "save",
    "scales",
    "stream",
    "targets",
    "valid_counts",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'foretoken' has no attribute '{name}'")
    from importlib import import_module

    module, _, attribute = _PUBLIC[name].partition(":")
    return getattr(import_module(f"foretoken.{module}"), attribute or name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
