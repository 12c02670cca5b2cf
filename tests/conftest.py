"""Small models and decoding helpers that several test files share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import tiny_engine_model
import torch
from hypothesis import settings
from small_runs import write_corpus
from trained_models import KINDS, Trained, exported

from foretoken import decode as decoding
from foretoken import pace
from foretoken.cache import KVCache
from foretoken.checkpoint import save_checkpoint
from foretoken.config import ModelConfig
from foretoken.decode import decode
from foretoken.draft import Drafter, Proposal, Start
from foretoken.drafters import Source
from foretoken.model import Model, Stepper
from foretoken.request import Request
from foretoken.sampling import Sampling
from foretoken.tokenizer import byte_tokenizer

torch.set_num_threads(1)
pace.ENOUGH = 0.0  # seconds that costs of steps are measured for: what is chosen may be wrong here
settings.register_profile("tests", deadline=None)
settings.load_profile("tests")


def tiny_config(
    architecture: str = "llama", n_future: int = 4, layers: int = 3, width: int = 32, kv_heads: int = 2,
    vocab: int = 17, **fields: object,
) -> ModelConfig:  # fmt: skip
    return ModelConfig.model_validate(
        {
            "architecture": architecture,
            "vocab_size": vocab,
            "hidden_size": width,
            "intermediate_size": 2 * width,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "num_key_value_heads": kv_heads,
            "head_dim": width // 4,
            "max_position_embeddings": 256,
            "n_future": n_future,
            **fields,
        }
    )


@torch.no_grad()
def tiny_model(
    architecture: str = "llama", n_future: int = 4, layers: int = 3, width: int = 32, kv_heads: int = 2,
    vocab: int = 17, dtype: torch.dtype = torch.float64, seed: int = 0, peaked: bool = True, **fields: object,
) -> Model:  # fmt: skip
    """A model whose norms and biases are random too; `peaked` weights make confident, context-dependent choices."""
    model = Model(tiny_config(architecture, n_future, layers, width, kv_heads, vocab, **fields)).to(dtype)
    model.init_weights(seed)
    generator = torch.Generator().manual_seed(seed + 1)
    scale = {"embed_tokens": 20, "lm_head": 40, "o_proj": 40, "down_proj": 40}
    for name, p in model.named_parameters():
        if p.dim() == 1:
            p.add_(torch.randn(p.shape, generator=generator, dtype=dtype), alpha=0.2)
        elif peaked:
            p.mul_(scale.get(name.split(".")[-2], 10))
    return model.eval()


def run(
    model: Model,
    prompts: Sequence[Sequence[int]],
    drafts: int | None,
    sampling: Sampling | None = None,
    max_tokens: int | Sequence[int] = 24,
    seeds: Sequence[int] | None = None,
    end_ids: Sequence[int] = (),
    source: Source = None,
    draft_vocab: int | None = None,
) -> list[Request]:
    """Decode `prompts` as one batch and return the finished requests."""
    limits = [max_tokens] * len(prompts) if isinstance(max_tokens, int) else max_tokens
    requests = [
        Request(list(prompt), limit, seeds[i] if seeds else i, frozenset(end_ids))
        for i, (prompt, limit) in enumerate(zip(prompts, limits, strict=True))
    ]
    for _ in decode(model, requests, sampling or Sampling(), drafts, source=source, draft_vocab=draft_vocab):
        pass
    return requests


Oracle = Callable[[dict[tuple[int, ...], list[int]], int, int], None]


@pytest.fixture
def oracle_drafter(monkeypatch: pytest.MonkeyPatch) -> Oracle:
    """Makes drafts right up to the j-th and wrong behind: call it with {prompt: plain ids}, j and the vocabulary."""

    def install(plain: dict[tuple[int, ...], list[int]], right: int, vocab: int) -> None:
        class OracleDrafter(Drafter):
            compiled = False

            def __init__(self, stepper: Stepper, drafts: int, *_: object) -> None:
                super().__init__(stepper, drafts)

            def propose(self, start: Start, cache: KVCache | None) -> Proposal:
                rows = []
                for request, tokens in zip(start.requests, start.new, strict=True):
                    at = len(request.ids) + len(tokens)
                    coming = [*plain[tuple(request.prompt)][at : at + self.drafts], *[0] * self.drafts][: self.drafts]
                    rows.append([token if k < right else (token + 1) % vocab for k, token in enumerate(coming)])
                return rows, None

        monkeypatch.setattr(decoding, "make_drafter", OracleDrafter)

    return install


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with small files in `text` and a place for their tokens."""
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint without heads, three blocks deep."""
    model = tiny_model(n_future=1, layers=3, vocab=260, dtype=torch.float32, peaked=False)
    return save_checkpoint(tmp_path_factory.mktemp("plain") / "model", model, byte_tokenizer())


@pytest.fixture(scope="session")
def sequential(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A model with a sequential head that engines load."""
    out = tiny_engine_model.make(tmp_path_factory.mktemp("sequential") / "model", "sequential")
    return exported("sequential", out, byte_tokenizer(), tiny_engine_model.PROMPTS)


@pytest.fixture(scope="session")
def parallel(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A model with parallel heads that engines load."""
    out = tiny_engine_model.make(tmp_path_factory.mktemp("parallel") / "model", "parallel")
    return exported("parallel", out, byte_tokenizer(), tiny_engine_model.PROMPTS)


@pytest.fixture(params=KINDS)
def trained(request: pytest.FixtureRequest) -> Trained:
    """Either of them."""
    value = request.getfixturevalue(request.param)
    assert isinstance(value, Trained)
    return value
