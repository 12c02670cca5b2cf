"""Further heads on a transformers model, for those who train in a loop of their own."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foretoken.checkpoint import save_checkpoint
from foretoken.config import HeadKind, ModelConfig, Unembedding, validated
from foretoken.errors import ConfigError
from foretoken.formats import hf
from foretoken.heads import make_heads, make_unembeddings
from foretoken.layers import Context, Rotary
from foretoken.model import Model
from foretoken.tokenizer import Tokenizer
from foretoken.tokenizer import load as load_tokenizer

ATTACHED = ("parallel", "joint", "sequential")  # kinds that read what the last block reads


class WithHeads(nn.Module):
    """A transformers model and its heads 2..n. The model runs as it is, with whatever it has been given.

    model: a Llama, Mistral, Qwen2 or Qwen3 with its unembedding (`...ForCausalLM`). heads: at first copies of its last
    block, as far as they fit a sequential head. own_unembeddings: theirs, if any, at first copies of the model's.
    """

    def __init__(self, model: Any, config: ModelConfig) -> None:
        super().__init__()
        self.model, self.shape = model, config
        self.config = model.config  # which trainers of transformers look at
        self.heads = make_heads(config).to(model.dtype)
        last = f"model.layers.{config.num_hidden_layers - 1}."
        own = {name.removeprefix(last): t for name, t in model.state_dict().items() if name.startswith(last)}
        self.heads[0].load_state_dict(own)
        self.heads.start_from_head_1()
        self.heads[0] = nn.Identity()  # head 1 is the model's own last block
        self.own_unembeddings = make_unembeddings(config).to(model.dtype)
        for layer in self.own_unembeddings:
            layer.load_state_dict({"weight": model.get_output_embeddings().weight})
        self.rotary = Rotary(config)
        self.to(model.device)

    @property
    def unembedding(self) -> Tensor | list[Tensor]:
        """Of all heads (V, D), or n where further heads have their own, for `mtp_loss`."""
        weight: Tensor = self.model.get_output_embeddings().weight
        own = list(self.own_unembeddings.parameters())
        return [weight, *own] if own else weight

    def forward(self, tokens: Tensor, length: int | None = None) -> list[Tensor]:
        """Tokens -> n normalised states (B, T, D), head 1 first: what `mtp_loss` takes.

        length: T, by default all; tokens (B, T or more) behind it are only read as those a sequential head is fed.
        Attention is causal over the whole row, so padding stands on the right, with labels that are masked.
        """
        T = tokens.size(1) if length is None else length
        base = self.model.get_decoder()
        out = base(input_ids=tokens[:, :T], output_hidden_states=True, use_cache=False)
        n, z = self.shape.n_future, out.hidden_states[-2]  # the last block's input; the last one is normalised
        further = F.pad(tokens, (0, max(0, T + n - 1 - tokens.size(1))))
        table = self.model.get_input_embeddings().weight

        def context_at(depth: int) -> Context:
            positions = torch.arange(depth - 1, depth - 1 + T, device=tokens.device)[None]
            return Context(*self.rotary(positions))

        states = self.heads.rest(z, z, lambda depth: F.embedding(further[:, depth : depth + T], table), context_at)
        return [out.last_hidden_state, *(base.norm(state) for state in states)]

    def gradient_checkpointing_enable(self, **options: Any) -> None:
        """Of the model, as trainers of transformers ask for it; the heads keep their activations."""
        self.model.gradient_checkpointing_enable(**options)

    def gradient_checkpointing_disable(self) -> None:
        """The opposite."""
        self.model.gradient_checkpointing_disable()

    def save(self, directory: str | Path, tokenizer: Any) -> Path:
        """Write a checkpoint that `foretoken generate` decodes with all heads, and transformers without them.

        tokenizer: one of transformers, ours, or a folder with tokenizer.json. Raises ConfigError where the model holds
        adapters that are not merged.
        """
        _require_no_adapters(self.model)
        with torch.device("meta"):
            model = Model(self.shape)
        given = self.model.state_dict()
        own = self.state_dict()
        state = {}
        for name in model.state_dict():
            there = "lm_head.weight" if name == "lm_head.weight" else hf.main_name(name, self.shape)
            state[name] = own[name] if there is None else given[there]
        model.load_state_dict(state, assign=True)
        if self.shape.tie_word_embeddings:
            model.lm_head.weight = model.embed_tokens.weight
        return save_checkpoint(directory, model, _tokenizer(tokenizer))


def attach_heads(
    model: Any, n_future: int, head_kind: HeadKind = "parallel", unembedding: Unembedding = "shared"
) -> WithHeads:
    """Give a transformers causal language model heads 2..n_future (Gloeckle et al. 2024, or an EAGLE-3 layer).

    n_future: at least 2. head_kind: parallel, joint or sequential. unembedding: "per_head" gives each further head
    one of its own. What is returned shares the model, which stays as it is.
    Raises ConfigError for a model without what heads need, CheckpointError for an architecture that is not supported.
    """
    _require_no_adapters(model)
    values = {**model.config.to_dict(), "architectures": [type(model).__name__]}
    config = hf.model_config(values, None, type(model).__name__)
    if n_future < 2:
        raise ConfigError(f"n_future = {n_future} adds no head; it must be at least 2")
    if head_kind not in ATTACHED:
        raise ConfigError(f"head_kind = {head_kind!r} reads head 1's own state; attached are {', '.join(ATTACHED)}")
    fields = config.model_dump() | {"n_future": n_future, "head_kind": head_kind, "unembedding": unembedding}
    return WithHeads(model, validated(ModelConfig, fields, "attach_heads"))


def _require_no_adapters(model: Any) -> None:
    if any(".base_layer." in name for name, _ in model.named_parameters()):
        raise ConfigError("the model holds adapters of peft; merge them into its weights first (merge_and_unload)")


def _tokenizer(given: Any) -> Tokenizer:
    if isinstance(given, Tokenizer):
        return given
    if isinstance(given, str | Path):
        return load_tokenizer(given)
    with tempfile.TemporaryDirectory() as folder:
        given.save_pretrained(folder)
        return load_tokenizer(folder)
