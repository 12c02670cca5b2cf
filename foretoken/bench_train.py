"""`foretoken bench train`: time and memory of a training step by number of heads, beside other ways to take the loss.

1. Models of one number of blocks: with n heads n - 1 of them are taken from the trunk, so that what is left to compare
   is the loss. Random weights, random tokens; a step is a forward and a backward.
2. Ways: `mtp_loss` (chunked); the paper's head by head backward (sequential); all heads' logits at a time (naive); a
   matrix per head on the trunk's output, each head's cross-entropy computed again in the backward (replicated), which
   is how the paper's authors' public trainer does it.
3. Memory is the most that a step takes above what lies there before it: parameters and gradients.
4. FLOPs are those of the matrix products: 6 for each weight and token, and attention's, causal.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from foretoken.bench import check_out, once
from foretoken.bench_cases import DTYPES
from foretoken.bench_decode import machine
from foretoken.bench_peers import versions
from foretoken.config import ModelConfig
from foretoken.display import Display
from foretoken.errors import ConfigError
from foretoken.files import write_json
from foretoken.loss import mtp_loss, scales, sequential_backward, targets, valid_counts
from foretoken.model import Model

WAYS = ("chunked", "sequential", "naive", "replicated")
PEERS = ("liger", "cce", "cce_exact", "torch")  # other fused losses, a call per head, where they are installed


def shape(vocab_size: int, width: int, blocks: int, context: int, n: int) -> ModelConfig:
    """A model of `blocks` blocks, the further heads' among them. Raises ConfigError for a width that no heads share."""
    heads = max(1, width // (128 if width >= 2048 and width % 128 == 0 else 64))  # as wide as the paper's (table S14)
    if width // heads % 2:
        raise ConfigError(
            f"width = {width} gives attention heads an odd width, {width // heads}: take a multiple of 64"
        )
    return ModelConfig.model_validate(
        {
            "vocab_size": vocab_size, "hidden_size": width, "intermediate_size": -(-8 * width // 192) * 64,
            "num_hidden_layers": blocks - n + 1, "num_attention_heads": heads, "num_key_value_heads": heads,
            "head_dim": width // heads, "max_position_embeddings": context, "n_future": n,
        }
    )  # fmt: skip


def flops(config: ModelConfig, positions: int, context: int) -> float:
    """Of a forward and a backward of so many positions, in windows of `context`."""
    c, blocks = config, config.num_hidden_layers + config.n_future - 1
    width = c.num_attention_heads * c.head_dim
    block = c.hidden_size * (2 * width + 2 * c.num_key_value_heads * c.head_dim + 3 * c.intermediate_size)
    attention = 12 * blocks * width * context / 2
    return positions * (6 * (blocks * block + c.n_future * c.vocab_size * c.hidden_size) + attention)


def step_of(way: str, config: ModelConfig, dtype: torch.dtype, device: str, compiled: bool) -> tuple[nn.Module, Any]:
    """A model, and what takes the windows' tokens (B, T + n) through a forward and a backward."""
    n = config.n_future
    if way == "replicated":
        config = config.model_copy(update={"n_future": 1, "num_hidden_layers": config.num_hidden_layers + n - 1})
    model = Model(config)
    model.init_weights(0)
    model.to(device)
    if compiled:
        model.compile_blocks()
    matrices = [nn.Linear(config.hidden_size, config.vocab_size, bias=False) for _ in range(n - 1)]
    further = nn.ModuleList(matrices if way == "replicated" else ()).to(device)

    def step(tokens: Tensor) -> None:
        T = tokens.size(1) - n
        everywhere = torch.zeros_like(tokens), torch.ones_like(tokens, dtype=torch.bool)
        labels = targets(tokens, *everywhere, n)
        factors = scales([1.0] * n, valid_counts(labels))
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            if way == "sequential":
                context = model.context(T)
                heads = [partial(model.run_head, context=context, depth=d) for d in range(n)]
                z = model.run_trunk(tokens[:, :T], context)
                sequential_backward(z, heads, model.unembeddings(), labels, factors)
                return
            hidden = model(tokens[:, :T] if way == "replicated" else tokens, length=T)
            if way == "chunked":
                total = mtp_loss(hidden, model.unembeddings(), labels, factors).total
            elif way in PEERS:
                states = [h.to(dtype).flatten(0, 1) for h in hidden]
                weight = model.lm_head.weight.to(dtype)
                losses = [fused(way)(h, weight, y.flatten()) for h, y in zip(states, labels, strict=True)]
                total = torch.stack(losses).sum()
            elif way == "naive":
                losses = [
                    cross_entropy(F.linear(h, model.lm_head.weight), y) for h, y in zip(hidden, labels, strict=True)
                ]
                total = torch.stack(losses).sum()
            else:
                losses = [
                    checkpoint(unembedded, hidden[0], layer.weight, y, use_reentrant=False)
                    for layer, y in zip((model.lm_head, *further), labels, strict=True)
                ]
                total = torch.stack(losses).sum()
        total.backward()  # type: ignore[no-untyped-call]

    return nn.ModuleList([model, further]), step


@functools.cache
def fused(way: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """A peer's mean cross-entropy of labels (R) from states (R, D) and an unembedding (V, D).

    Raises ConfigError where it is not installed.
    """
    try:
        if way.startswith("cce"):  # by default it leaves out of the gradient what has a small probability
            from cut_cross_entropy import linear_cross_entropy

            found: Any = linear_cross_entropy
            return partial(found, filter_eps=None) if way == "cce_exact" else found
        if way == "torch":
            return F.linear_cross_entropy
        from liger_kernel.ops import LigerFusedLinearCrossEntropyFunction as Liger
    except (ImportError, AttributeError):
        needs = {"liger": "pip install liger-kernel", "torch": "torch 2.13"}.get(way, "pip install cut-cross-entropy")
        raise ConfigError(f"way {way} needs: {needs}") from None

    def liger(states: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        options = (None, None, -100, 0.0, 0.0, "mean", None, False, torch.float32)
        total: Tensor = Liger.apply(states, weight, labels, *options)[0]
        return total

    return liger


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Of all positions at a time."""
    return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten())


def unembedded(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """The same, from states and a matrix."""
    return cross_entropy(F.linear(hidden, weight), labels)


def measured(step: Callable[[Tensor], None], tokens: Tensor, rounds: int) -> tuple[list[float], float | None]:
    """Seconds of each round, and the most MiB that one took above what lay there before; None: not to be known here."""
    seconds, peaks = list[float](), list[float]()
    for number in range(rounds + 1):
        gc.collect()
        before = _begin_peak(tokens.device)
        began = time.perf_counter()
        step(tokens)
        if tokens.device.type == "cuda":
            torch.cuda.synchronize()
        if number:  # the first warms up, and makes the gradients
            seconds.append(time.perf_counter() - began)
            if before is not None:
                peaks.append(max(0.0, _peak(tokens.device) - before))
    return seconds, max(peaks, default=None)


def _begin_peak(device: torch.device) -> float | None:
    """Forget the highest use of memory so far; what is used now, in MiB. None where that cannot be forgotten."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 2**20
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what was freed is given back, so that it counts when it is taken again
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except (OSError, AttributeError):
        return None  # not Linux, or a container that keeps /proc as it is
    return _status("VmRSS")


def _peak(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return _status("VmHWM")


def _status(key: str) -> float:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(float(line.split()[1]) / 1024 for line in lines if line.startswith(key))


def product_tflops(device: str, dtype: torch.dtype) -> float:
    """What a large matrix product reaches here, in TFLOP/s: the best of some."""
    size = 8192 if device == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    seconds = []
    for _ in range(10):
        began = time.perf_counter()
        (a @ b)[0, 0].item()
        seconds.append(time.perf_counter() - began)
    return 2 * size**3 / min(seconds) / 1e12


def bench_train(
    display: Display,
    *,
    vocabularies: Sequence[int],
    heads: Sequence[int],
    ways: Sequence[str],
    width: int,
    blocks: int,
    context: int,
    batch: int,
    rounds: int,
    dtype: str,
    device: str = "cpu",
    compiled: bool = False,
    out: Path | None = None,
) -> dict[str, Any]:
    """What the command prints with --json, and writes to `out`: machine, versions, product_tflops and rows.

    Raises ConfigError for sizes and counts that make no sense, and for an `out` that cannot be written.
    """
    check_out(out)
    vocabularies, heads, ways = once(vocabularies), once(heads), once(ways)
    _check_ways(ways)
    if dtype not in DTYPES:
        raise ConfigError(f"dtype {dtype}: must be one of {', '.join(DTYPES)}")
    for name, value, least in (
        ("vocabulary", min(vocabularies), 2), ("heads", min(heads), 1), ("blocks", blocks, max(heads)),
        ("width", width, 2), ("context", context, 1), ("batch", batch, 1), ("rounds", rounds, 1),
    ):  # fmt: skip
        if value < least:
            raise ConfigError(f"{name} = {value} must be at least {least}")
    shape(vocabularies[0], width, blocks, context, heads[0])
    ceiling = product_tflops(device, DTYPES[dtype])
    rows: list[dict[str, Any]] = []
    generator = torch.Generator().manual_seed(0)
    for vocabulary, way, n in itertools.product(vocabularies, ways, heads):
        display.progress(f"V = {vocabulary}, {way}, n = {n}")
        config = shape(vocabulary, width, blocks, context, n)
        tokens = torch.randint(0, vocabulary, (batch, context + n), generator=generator).to(device)
        model, step = step_of(way, config, DTYPES[dtype], device, compiled)
        seconds, peak = measured(step, tokens, rounds)
        took, work = statistics.median(seconds), flops(config, batch * context, context)
        rows.append(
            {
                "vocabulary": vocabulary, "way": way, "n": n, "width": width, "blocks": blocks, "context": context,
                "batch": batch, "dtype": dtype, "compiled": compiled,
                "parameters": sum(p.numel() for p in model.parameters()), "ms": 1e3 * took, "min": 1e3 * min(seconds),
                "max": 1e3 * max(seconds), "runs": rounds, "tokens_per_second": batch * context / took,
                "peak_mib": peak, "flops": work, "tflops": work / took / 1e12,
                "utilisation": work / took / 1e12 / ceiling,
            }
        )  # fmt: skip
        del model, step
    display.progress("Done", last=True)
    _add_ratios(rows, len(heads))
    found = {"machine": {**machine(), "device": device}, "versions": versions(), "product_tflops": ceiling}
    result = {**found, "rows": rows}
    if out is not None:
        write_json(out, result)
    return result


def _add_ratios(rows: list[dict[str, Any]], heads: int) -> None:
    """Beside the first number of heads in the same way: every so many rows are of one."""
    for index, row in enumerate(rows):
        first = rows[index - index % heads]
        for key in ("ms", "flops", "peak_mib"):
            unknown = row[key] is None or first[key] is None
            row[f"{key}_ratio"] = None if unknown else row[key] / max(first[key], 1e-9)


def _check_ways(ways: Sequence[str]) -> None:
    for way in ways:
        if way not in WAYS + PEERS:
            raise ConfigError(f"way {way}: must be one of {', '.join(WAYS + PEERS)}")
        if way in PEERS:
            fused(way)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    columns = ("V", "way", "n", "ms a step", "tokens/s", "time ratio", "FLOPs ratio", "peak MiB", "memory ratio",
               "of a product's rate")  # fmt: skip
    lines = [columns, ("---",) * len(columns)]
    for row in rows:
        spread = f"{row['ms']:.0f} [{row['min']:.0f} - {row['max']:.0f}]"
        ratios = [f"{row[key]:.2f}" for key in ("ms_ratio", "flops_ratio")]
        lines.append(
            (str(row["vocabulary"]), row["way"], str(row["n"]), spread, f"{row['tokens_per_second']:.0f}", *ratios,
             _shown(row["peak_mib"], 0), _shown(row["peak_mib_ratio"], 2), f"{row['utilisation']:.2f}")
        )  # fmt: skip
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _shown(value: float | None, digits: int) -> str:
    return "not measured" if value is None else f"{value:.{digits}f}"
