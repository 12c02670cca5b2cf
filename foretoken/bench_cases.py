"""What `foretoken bench decode` times: models and the prompts behind which they decode, checked before it begins.

A checkpoint, whose held-out text or other data give prompts, or shapes with random weights behind random tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from foretoken.bench import held_out_prompts, whole_prompts
from foretoken.bench_peers import Workload
from foretoken.checkpoint import find_checkpoint, load_checkpoint
from foretoken.config import ModelConfig, validated
from foretoken.decode import check_draft_vocab, check_requests
from foretoken.errors import ConfigError
from foretoken.evaluate import evaluation_documents
from foretoken.model import Model
from foretoken.request import Request
from foretoken.sampling import Sampling
from foretoken.tokenizer import Tokenizer, byte_tokenizer

# Shapes by the size of the next-token path at V = 32,000, embeddings tied: width, blocks, heads, width of the MLP.
SHAPES = {
    "30m": (512, 6, 8, 1408),
    "110m": (768, 12, 12, 2048),
    "350m": (1024, 24, 16, 2816),
    "1b": (2048, 18, 32, 5632),
}
VOCABULARY = 32_000
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class Case:
    """A model and what it is timed on. make: the model, when its turn comes. own_text: whether its text means anything,
    and so how many drafts are accepted."""

    name: str
    make: Callable[[], Model]
    tokenizer: Tokenizer
    works: list[Workload]
    drafts: range
    own_text: bool


def random_config(size: str, n_future: int, head_kind: str, positions: int) -> ModelConfig:
    """A shape in SHAPES. Raises ConfigError where there is none, or none with such heads."""
    if size not in SHAPES:
        raise ConfigError(f"size {size}: must be one of {', '.join(SHAPES)}")
    width, layers, heads, mlp = SHAPES[size]
    return validated(
        ModelConfig,
        {
            "vocab_size": VOCABULARY, "hidden_size": width, "intermediate_size": mlp, "num_hidden_layers": layers,
            "num_attention_heads": heads, "num_key_value_heads": heads, "head_dim": width // heads,
            "max_position_embeddings": positions, "tie_word_embeddings": True, "n_future": n_future,
            "head_kind": head_kind,
        },
        "--head-kind, --n-future",
    )  # fmt: skip


def random_model(config: ModelConfig, dtype: torch.dtype, device: str) -> Model:
    """A model of a shape with random weights."""
    model = Model(config)
    model.init_weights(0)
    return model.to(dtype).to(device).eval()


def random_case(
    size: str, n_future: int, head_kind: str, dtype: torch.dtype, device: str, batches: Sequence[int],
    temperatures: Sequence[float], context: int, tokens: int, draft_vocabs: Sequence[int],
) -> Case:  # fmt: skip
    """A shape with random weights behind random tokens: what steps cost."""
    config, works = random_config(size, n_future, head_kind, context + tokens), list[Workload]()
    generator = torch.Generator().manual_seed(0)
    for batch in batches:
        prompts = torch.randint(0, 256, (batch, context), generator=generator).tolist()
        works += [Workload("random tokens", prompts, batch, tokens, temperature) for temperature in temperatures]
    drafts = range(1, n_future)
    with torch.device("meta"):
        check(Model(config), works, drafts, draft_vocabs)
    name = f"{size}, {head_kind} heads, random weights"
    return Case(name, partial(random_model, config, dtype, device), byte_tokenizer(), works, drafts, False)


def checkpoint_case(
    directory: str, data: Sequence[str], split_field: str | None, prompt_field: str | None, dtype: str, device: str,
    batches: Sequence[int], temperatures: Sequence[float], prompts: int, tokens: int, random_heads: bool,
    draft_vocabs: Sequence[int],
) -> Case:  # fmt: skip
    """A checkpoint, by domain behind beginnings of `prompts` texts of the data, by default the held-out ones.

    prompt_field: of records that are prompts as they stand; of long ones, the end that the model has room for.
    """
    folder = find_checkpoint(directory)
    model, tokenizer = load_checkpoint(folder, dtype, device)
    room = model.config.max_position_embeddings - tokens
    if room < 1:
        raise ConfigError(f"tokens = {tokens} leaves no room for a prompt in the {room + tokens} positions of {folder}")
    if random_heads and model.config.n_future == 1:
        raise ConfigError(f"--random-heads: {folder} has no further heads to spoil")
    if random_heads:
        for head in list(model.heads)[1:]:
            for parameter in head.parameters():
                torch.nn.init.normal_(parameter, 0.0 if parameter.dim() > 1 else 1.0, 0.02)
    works = []
    for source in data or ("",):
        split = "validation" if split_field else None
        named = {"split_field": split_field, "text_field": prompt_field}
        fields = {name: field for name, field in named.items() if field}
        texts = [d.text for d in evaluation_documents(directory, (source,) if source else (), split, fields)]
        where = source or f"what {folder} held out"
        chosen = whole_prompts(texts, prompts) if prompt_field else held_out_prompts(texts, prompts, where)
        if len(chosen) < max(batches):
            raise ConfigError(f"batch = {max(batches)} is more than the {len(chosen)} prompts of {where}")
        ids = [tokenizer.encode(text, add_special_tokens=True)[-room:] for text in chosen]
        for temperature in temperatures:
            works += [Workload(_domain(source, data), ids, batch, tokens, temperature) for batch in batches]
    drafts = range(1, model.config.n_future + (1 if model.config.goes_on else 0))
    check(model, works, drafts, draft_vocabs)
    name = f"{folder.name}, further heads random" if random_heads else folder.name
    return Case(name, lambda: model, tokenizer, works, drafts, True)


def check(model: Model, works: Sequence[Workload], drafts: Sequence[int], draft_vocabs: Sequence[int]) -> None:
    """Raises ConfigError for what decoding would refuse in the midst of it. The model needs no weights."""
    for size in draft_vocabs:
        check_draft_vocab(size, model)
    for work in works:
        Sampling(work.temperature)
        requests = [Request(prompt, work.tokens) for prompt in work.prompts]
        check_requests(model, requests, max(drafts, default=0))


def _domain(source: str, sources: Sequence[str]) -> str:
    """What prompts of a source are called: by the file's name, where no other has that."""
    names = [each if each.startswith("hf:") else Path(each).name or each for each in sources]
    found = dict(zip(sources, names, strict=True)).get(source, "held out")
    return source if names.count(found) > 1 else found
