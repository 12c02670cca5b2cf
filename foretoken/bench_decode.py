"""`foretoken bench decode`: the time of a decoding step, beside strong peers on the same weights in the same run.

1. Models: a checkpoint, whose held-out text gives prompts, or shapes with random weights. Those show what a step costs;
   how many of their drafts are accepted means nothing, and is not given. A checkpoint whose further heads are made
   random is the worst case of K chosen by what pays: the speedup is then what looking for it costs.
2. Decoders: plain, and every number of drafts; transformers' `generate`, plainly and with prompt lookup; llama.cpp in
   this process with 16-bit GGUF weights.
3. Rounds: each decoder once a round, in turn, so that all meet the same machine. Times are of what follows the first
   token: the prompt is not in them. The row of a decoder holds the median of its rounds, the lowest and the highest.
4. The bound: a step reads every weight of the next-token path once, so it takes at least their bytes / bandwidth.
"""

from __future__ import annotations

import platform
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from foretoken.bench import held_out_prompts, whole_prompts
from foretoken.bench_peers import Timing, Workload, decoders, versions
from foretoken.checkpoint import find_checkpoint, load_checkpoint, save_checkpoint
from foretoken.config import ModelConfig, validated
from foretoken.decode import check_draft_vocab
from foretoken.display import Display
from foretoken.errors import ConfigError
from foretoken.evaluate import evaluation_documents
from foretoken.formats import hf
from foretoken.model import Model
from foretoken.request import Request
from foretoken.tokenizer import byte_tokenizer

# Shapes by the size of the next-token path at V = 32,000, embeddings tied: width, blocks, heads, width of the MLP.
SHAPES = {
    "30m": (512, 6, 8, 1408),
    "110m": (768, 12, 12, 2048),
    "350m": (1024, 24, 16, 2816),
    "1b": (2048, 18, 32, 5632),
}
VOCABULARY = 32_000
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def random_model(size: str, n_future: int, head_kind: str, dtype: torch.dtype, context: int) -> Model:
    """A model of a shape in SHAPES with random weights."""
    if size not in SHAPES:
        raise ConfigError(f"size {size}: must be one of {', '.join(SHAPES)}")
    width, layers, heads, mlp = SHAPES[size]
    config = validated(
        ModelConfig,
        {
            "vocab_size": VOCABULARY, "hidden_size": width, "intermediate_size": mlp, "num_hidden_layers": layers,
            "num_attention_heads": heads, "num_key_value_heads": heads, "head_dim": width // heads,
            "max_position_embeddings": context, "tie_word_embeddings": True, "n_future": n_future,
            "head_kind": head_kind,
        },
        "--head-kind, --n-future",
    )  # fmt: skip
    model = Model(config)
    model.init_weights(0)
    return model.to(dtype).eval()


def machine() -> dict[str, Any]:
    """Where this runs."""
    capabilities = torch.cpu.get_capabilities()
    processor = [line for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    return {
        "cpu": processor[0].partition(":")[2].strip() if processor else platform.processor(),
        "threads": torch.get_num_threads(),
        "avx512_bf16": bool(capabilities.get("avx512_bf16")),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def bandwidth(device: str) -> float:
    """Memory bandwidth in GB/s: the sum of float32 numbers (256 MiB, of a GPU 4 GiB), the best of ten readings."""
    numbers = torch.ones(1 << (30 if device == "cuda" else 26), device=device)
    seconds = []
    for _ in range(10):
        began = time.perf_counter()
        numbers.sum().item()
        seconds.append(time.perf_counter() - began)
    return numbers.numel() * 4 / min(seconds) / 1e9


def bench(
    name: str, model: Model, folder: Path, works: Sequence[Workload], drafts: Sequence[int], rounds: int, peers: bool,
    gb_s: float, meaningful: bool, draft_vocabs: Sequence[int], display: Display,
) -> list[dict[str, Any]]:  # fmt: skip
    """The rows of one model, whose directory is `folder`. meaningful: whether acceptance means something."""
    for size in draft_vocabs:
        check_draft_vocab(size, model)
    rows = []
    main = [p for n, p in model.named_parameters() if hf.main_name(n, model.config)]
    for work in works:
        runs = list(decoders(model, folder, work, drafts, peers, meaningful, draft_vocabs))
        found: list[list[Timing]] = [[] for _ in runs]
        for number in range(rounds + 1):  # the first warms up
            for index, (label, k, run) in enumerate(runs):
                display.progress(
                    f"{name}, {work.domain}, batch {work.batch}, round {number}/{rounds}: {label}, K = {k}"
                )
                timing = run()
                if number:
                    found[index].append(timing)
        plain = found[0]
        for (label, k, _), timings in zip(runs, found, strict=True):
            row = {
                "model": name,
                "parameters": sum(p.numel() for p in main),
                "dtype": str(model.dtype).removeprefix("torch."),
                "domain": work.domain,
                "temperature": work.temperature,
                "batch": work.batch,
                "context": round(statistics.mean(map(len, work.prompts))),
                "decoder": label,
                "drafts": k,
                **_figures(timings, plain, meaningful or not k),
            }
            if "rejection" in label:  # another sample of the same law
                row["differing"] = row["margin"] = None
            weight_bytes = sum(p.numel() * p.element_size() for p in main)
            row["fraction_of_bound"] = weight_bytes / gb_s / 1e6 / row["ms_per_step"]
            rows.append(row)
    display.progress(f"{name}: done", last=True)
    return rows


def _figures(timings: Sequence[Timing], plain: Sequence[Timing], meaningful: bool) -> dict[str, Any]:
    """Medians over the rounds, and ratios to plain decoding in the same rounds."""
    each = [1e3 * t.seconds / t.steps for t in timings]
    cost = [(t.seconds / t.steps) / (p.seconds / p.steps) for t, p in zip(timings, plain, strict=True)]
    speedup = [p.seconds / p.tokens * t.tokens / t.seconds for t, p in zip(timings, plain, strict=True)]
    result = {
        "ms_per_step": statistics.median(each),
        "min": min(each),
        "max": max(each),
        "runs": len(each),
        "step_cost": statistics.median(cost),
        "tokens_per_step": None,
        "ms_per_token": None,
        "speedup": None,
        "differing": None,
        "margin": None,
    }
    if meaningful:
        result["tokens_per_step"] = sum(t.tokens for t in timings) / sum(t.row_steps for t in timings)
        result["ms_per_token"] = statistics.median(1e3 * t.seconds / t.tokens for t in timings)
        result["speedup"] = statistics.median(speedup)
    pairs = list(zip(timings[0].requests, plain[0].requests, strict=False))
    if pairs:
        margins = [gap for a, b in pairs if (gap := _margin(a, b)) is not None]
        result["differing"] = len(margins) / len(pairs)
        result["margin"] = max(margins, default=None)
    return result


def _margin(a: Request, b: Request) -> float | None:
    """Difference of the two tokens' log-probabilities where two outputs part; None where they do not."""
    for i, (x, y) in enumerate(zip(a.ids, b.ids, strict=True)):
        if x != y:
            return abs(a.logprobs[i] - b.logprobs[i])
    return None


def bench_random(
    size: str, n_future: int, head_kind: str, dtype: torch.dtype, device: str, batches: Sequence[int],
    temperatures: Sequence[float], context: int, tokens: int, rounds: int, peers: bool, draft_vocabs: Sequence[int],
    gb_s: float, display: Display,
) -> list[dict[str, Any]]:  # fmt: skip
    """The rows of a shape with random weights behind random tokens: what steps cost."""
    model = random_model(size, n_future, head_kind, dtype, context + tokens).to(device)
    generator = torch.Generator().manual_seed(0)
    works = []
    for batch in batches:
        prompts = torch.randint(0, 256, (batch, context), generator=generator).tolist()
        works += [Workload("random tokens", prompts, batch, tokens, temperature) for temperature in temperatures]
    with tempfile.TemporaryDirectory() as temporary:
        folder = save_checkpoint(Path(temporary) / "checkpoint", model, byte_tokenizer())
        name = f"{size}, {head_kind} heads, random weights"
        drafts = range(1, n_future)
        return bench(name, model, folder, works, drafts, rounds, peers, gb_s, False, draft_vocabs, display)


def bench_checkpoint(
    directory: str, data: Sequence[str], split_field: str | None, prompt_field: str | None, dtype: str | None,
    device: str, batches: Sequence[int], temperatures: Sequence[float], prompts: int, tokens: int, rounds: int,
    peers: bool, random_heads: bool, draft_vocabs: Sequence[int], gb_s: float, display: Display,
) -> list[dict[str, Any]]:  # fmt: skip
    """The rows of a checkpoint, by domain: beginnings of `prompts` texts of the data, by default the held-out ones.

    prompt_field: of records that are prompts as they stand; of long ones, the end that the model has room for.
    """
    folder = find_checkpoint(directory)
    model, tokenizer = load_checkpoint(folder, dtype, device)
    if random_heads:
        for head in list(model.heads)[1:]:
            for parameter in head.parameters():
                torch.nn.init.normal_(parameter, 0.0 if parameter.dim() > 1 else 1.0, 0.02)
    name = f"{folder.name}, further heads random" if random_heads else folder.name
    works = []
    for source in data or ("",):
        split = "validation" if split_field else None
        named = {"split_field": split_field, "text_field": prompt_field}
        fields = {name: field for name, field in named.items() if field}
        texts = [d.text for d in evaluation_documents(directory, (source,) if source else (), split, fields)]
        chosen = (whole_prompts if prompt_field else held_out_prompts)(texts, prompts)
        room = model.config.max_position_embeddings - tokens
        ids = [tokenizer.encode(text, add_special_tokens=True)[-room:] for text in chosen]
        for temperature in temperatures:
            works += [Workload(_domain(source, data), ids, batch, tokens, temperature) for batch in batches]
    drafts = range(1, model.config.n_future + (1 if model.config.goes_on else 0))
    with tempfile.TemporaryDirectory() as temporary:
        copy = save_checkpoint(Path(temporary) / "checkpoint", model, tokenizer)  # without heads renamed, in this type
        return bench(name, model, copy, works, drafts, rounds, peers, gb_s, True, draft_vocabs, display)


def _domain(source: str, sources: Sequence[str]) -> str:
    """What prompts of a source are called: by the file's name, where no other has that."""
    names = [each if each.startswith("hf:") else Path(each).name or each for each in sources]
    found = dict(zip(sources, names, strict=True)).get(source, "held out")
    return source if names.count(found) > 1 else found


def bench_decode(
    display: Display,
    *,
    checkpoint: str | None,
    data: Sequence[str],
    sizes: Sequence[str],
    head_kind: str,
    n_future: int,
    batches: Sequence[int],
    temperatures: Sequence[float],
    context: int,
    tokens: int,
    prompts: int,
    rounds: int,
    dtype: str,
    device: str = "cpu",
    peers: bool,
    random_heads: bool = False,
    split_field: str | None = None,
    prompt_field: str | None = None,
    draft_vocabs: Sequence[int] = (),
) -> dict[str, Any]:
    """What the command prints with --json: machine, versions, bandwidth_gb_s and rows.

    Raises ConfigError for sizes and counts that make no sense, CheckpointError for a checkpoint that does not load.
    """
    if checkpoint is None and not sizes:
        raise ConfigError("nothing to time: name a checkpoint, or a --size")
    for name, value, least in (
        ("tokens", tokens, 2), ("rounds", rounds, 1), ("prompts", prompts, 1), ("context", context, 1),
        ("n_future", n_future, 1), ("batch", min(batches), 1),
    ):  # fmt: skip
        if value < least:
            raise ConfigError(f"{name} = {value} must be at least {least}")
    if dtype not in DTYPES:
        raise ConfigError(f"dtype {dtype}: must be one of {', '.join(DTYPES)}")
    if checkpoint is not None:
        find_checkpoint(checkpoint)  # tell of a wrong path before anything is measured
    display.say("Measuring memory bandwidth")
    gb_s, rows = bandwidth(device), list[dict[str, Any]]()
    if checkpoint is not None:
        rows += bench_checkpoint(
            checkpoint, data, split_field, prompt_field, dtype, device, batches, temperatures or (0.0, 0.8), prompts,
            tokens, rounds, peers, random_heads, draft_vocabs, gb_s, display,
        )  # fmt: skip
    for size in sizes:
        rows += bench_random(
            size, n_future, head_kind, DTYPES[dtype], device, batches, temperatures or (0.0,), context, tokens, rounds,
            peers, draft_vocabs, gb_s, display,
        )  # fmt: skip
    return {
        "machine": {**machine(), "device": device},
        "versions": versions(),
        "bandwidth_gb_s": gb_s,
        "bandwidth_measured": "sum of float32 numbers (256 MiB, of a GPU 4 GiB), best of 10",
        "rows": rows,
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    columns = ("model", "domain", "T", "batch", "decoder", "K", "ms per step", "step cost", "tokens per step",
               "ms per token", "speedup", "of the bound", "differing")  # fmt: skip
    lines = [columns, ("---",) * len(columns)]
    for row in rows:
        time_of_step = f"{row['ms_per_step']:.2f} [{row['min']:.2f} - {row['max']:.2f}]"
        figures = ("step_cost", "tokens_per_step", "ms_per_token", "speedup", "fraction_of_bound", "differing")
        shown = ["" if row.get(name) is None else f"{row[name]:.2f}" for name in figures]
        where = (row["model"], row["domain"], f"{row['temperature']:g}", str(row["batch"]))
        lines.append(
            (*where, row["decoder"], "" if row["drafts"] is None else str(row["drafts"]), time_of_step, *shown)
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
