"""A directory that transformers itself drafts from: the model with its further heads as one class.

The class comes with the weights, as `modeling_foretoken.py`; `register_transformers` makes it known without that.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from foretoken.chat import generation_config
from foretoken.checkpoint import find_checkpoint, load_checkpoint
from foretoken.config import ModelConfig
from foretoken.errors import CheckpointError, ConfigError
from foretoken.files import new_directory, read_json, write_json
from foretoken.formats import hf
from foretoken.formats.safetensors import FILE, save_tensors
from foretoken.formats.trained import require_trained_heads

CODE = "modeling_foretoken"


def export_hf(checkpoint: str | Path, out: str | Path) -> Path:
    """Write `checkpoint` as one transformers model with all its heads to the new directory `out`; returns `out`.

    Raises CheckpointError for a model without further heads, which transformers loads as it is, and for heads that were
    never trained.
    """
    folder = find_checkpoint(checkpoint)
    model, tokenizer = load_checkpoint(folder)
    config = model.config
    if config.n_future == 1:
        raise CheckpointError(f"{folder}: has one head, so there is nothing to draft with; transformers loads it as is")
    if not config.portable:
        raise CheckpointError(f"{folder}: the class drafts with parallel and sequential heads, not {config.head_kind}")
    require_trained_heads(model, str(folder))
    values = read_json(folder / "config.json")
    for old in ("rope_theta", "rope_scaling", "torch_dtype") if "rope_parameters" in values else ():
        values.pop(old, None)  # what transformers 5 replaced, and warns of
    name = f"Foretoken{values['architectures'][0].removesuffix('ForCausalLM')}"
    values |= {
        "architectures": [f"{name}ForCausalLM"],
        "model_type": f"foretoken_{config.architecture}",
        "auto_map": {"AutoConfig": f"{CODE}.{name}Config", "AutoModelForCausalLM": f"{CODE}.{name}ForCausalLM"},
        "n_future": config.n_future,
        "head_kind": config.head_kind,
        "unembedding": config.unembedding,
    }
    tensors = {new: p.detach() for name, p in model.named_parameters() if (new := _name(name, config))}
    with new_directory(out) as staging:
        save_tensors(staging / FILE, tensors)
        write_json(staging / "config.json", values)
        tokenizer.save(staging, model_max_length=config.max_position_embeddings)
        write_json(staging / "generation_config.json", generation_config(tokenizer))
        shutil.copy(Path(__file__).with_name(f"{CODE}.py"), staging)
    return Path(out)


def _name(name: str, config: ModelConfig) -> str | None:
    """The class's name of our parameter `name`, None for a tied unembedding. Heads 2..n count from 0."""
    if name.startswith("own_unembeddings."):
        return f"mtp_{name.removeprefix('own_')}"
    depth, _, rest = name.removeprefix("heads.").partition(".")
    if name.startswith("heads.") and depth != "0":
        return f"mtp_heads.{int(depth) - 1}.{rest}"
    return hf.main_name(name, config)


def register_transformers() -> None:
    """Let transformers' AutoModelForCausalLM load what `export_hf` wrote without `trust_remote_code`.

    Raises ConfigError without the extra.
    """
    try:
        from foretoken.formats.modeling_foretoken import register
    except ImportError:
        raise ConfigError("register_transformers needs: pip install 'foretoken[hf]'") from None
    register()
