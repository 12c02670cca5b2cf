"""`foretoken bench decode`: the time of a decoding step, beside strong peers on the same weights in the same run.

1. Models: a checkpoint, whose held-out text gives prompts, or shapes with random weights. Those show what a step costs;
   how many of their drafts are accepted means nothing, and is not given. A checkpoint whose further heads are made
   random is the worst case of K chosen by what pays: the speedup is then what looking for it costs.
2. Decoders: plain, and every number of drafts; the same in PyTorch, not compiled, where asked; transformers'
   `generate`, plainly and with prompt lookup; llama.cpp in this process with 16-bit GGUF weights.
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

from foretoken.bench import check_out, once
from foretoken.bench_cases import DTYPES, Case, checkpoint_case, random_case
from foretoken.bench_peers import EAGER, Timing, decoders, versions
from foretoken.checkpoint import save_checkpoint
from foretoken.display import Display
from foretoken.errors import ConfigError
from foretoken.files import write_json
from foretoken.formats import hf
from foretoken.kernels import library
from foretoken.request import Request


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
    """Memory bandwidth in GB/s: sums of 16 rows of float32 (256 MiB, of a GPU 4 GiB), the best of ten readings."""
    numbers = torch.ones(16, 1 << (26 if device == "cuda" else 22), device=device)
    seconds = []
    for _ in range(10):
        began = time.perf_counter()
        numbers.sum(1).tolist()
        seconds.append(time.perf_counter() - began)
    return numbers.numel() * 4 / min(seconds) / 1e9


def bench(
    case: Case, rounds: int, peers: bool, draft_vocabs: Sequence[int], eager: bool, gb_s: float, display: Display
) -> list[dict[str, Any]]:
    """The rows of one model."""
    model, rows = case.make(), list[dict[str, Any]]()
    main = [p for n, p in model.named_parameters() if hf.main_name(n, model.config)]
    weight_bytes = sum(p.numel() * p.element_size() for p in main)
    with tempfile.TemporaryDirectory() as temporary:
        folder = save_checkpoint(Path(temporary) / "checkpoint", model, case.tokenizer)  # of this type, for the peers
        for work in case.works:
            runs = list(decoders(model, folder, work, case.drafts, peers, case.own_text, draft_vocabs, eager))
            found: list[list[Timing]] = [[] for _ in runs]
            for number in range(rounds + 1):  # the first warms up
                where = f"{case.name}, {work.domain}, batch {work.batch}, round {number}/{rounds}"
                for (label, k, run), timings in zip(runs, found, strict=True):
                    display.progress(f"{where}: {label}, K = {k}")
                    timing = run()
                    if number:
                        timings.append(timing)
            eagerly = next((each for (label, _, _), each in zip(runs, found, strict=True) if label == EAGER), found[0])
            for (label, k, _), timings in zip(runs, found, strict=True):
                row = {
                    "model": case.name,
                    "parameters": sum(p.numel() for p in main),
                    "dtype": str(model.dtype).removeprefix("torch."),
                    "domain": work.domain,
                    "temperature": work.temperature,
                    "batch": work.batch,
                    "context": round(statistics.mean(map(len, work.prompts))),
                    "decoder": label,
                    "drafts": k,
                    **_figures(timings, found[0], case.own_text or not k),
                    **_differing(timings[0], eagerly[0] if label.startswith(EAGER) else found[0][0]),
                }
                if "rejection" in label:  # another sample of the same law
                    row["differing"] = row["margin"] = None
                row["fraction_of_bound"] = weight_bytes / gb_s / 1e6 / row["ms_per_step"]
                rows.append(row)
    display.progress(f"{case.name}: done", last=True)
    return rows


def _figures(timings: Sequence[Timing], plain: Sequence[Timing], meaningful: bool) -> dict[str, Any]:
    """Medians over the rounds, and ratios to plain decoding in the same rounds."""
    each = [1e3 * t.seconds / t.steps for t in timings]
    cost = [(t.seconds / t.steps) / (p.seconds / p.steps) for t, p in zip(timings, plain, strict=True)]
    speedup = [(p.seconds * t.tokens) / (p.tokens * t.seconds) for t, p in zip(timings, plain, strict=True)]
    result = {
        "ms_per_step": statistics.median(each),
        "min": min(each),
        "max": max(each),
        "runs": len(each),
        "step_cost": statistics.median(cost),
        "tokens_per_step": None,
        "ms_per_token": None,
        "speedup": None,
    }
    if meaningful:
        result["tokens_per_step"] = sum(t.tokens for t in timings) / sum(t.row_steps for t in timings)
        result["ms_per_token"] = statistics.median(1e3 * t.seconds / t.tokens for t in timings)
        result["speedup"] = statistics.median(speedup)
    return result


def _differing(timing: Timing, plain: Timing) -> dict[str, float | None]:
    """Share of requests whose output is not that of plain steps of the same kind, and the widest margin."""
    if not timing.requests:
        return {"differing": None, "margin": None}
    pairs = zip(timing.requests, plain.requests, strict=True)
    margins = [gap for a, b in pairs if (gap := _margin(a, b)) is not None]
    return {"differing": len(margins) / len(timing.requests), "margin": max(margins, default=None)}


def _margin(a: Request, b: Request) -> float | None:
    """Difference of the two tokens' log-probabilities where two outputs part; None where they do not."""
    for i, (x, y) in enumerate(zip(a.ids, b.ids, strict=True)):
        if x != y:
            return abs(a.logprobs[i] - b.logprobs[i])
    return None


def bench_decode(
    display: Display, *, checkpoint: str | None, data: Sequence[str], sizes: Sequence[str], head_kind: str | None,
    n_future: int | None, batches: Sequence[int], temperatures: Sequence[float], context: int | None, tokens: int,
    prompts: int | None, rounds: int, dtype: str, device: str = "cpu", peers: bool, random_heads: bool = False,
    split_field: str | None = None, prompt_field: str | None = None, draft_vocabs: Sequence[int] = (),
    eager: bool = False, out: Path | None = None,
) -> dict[str, Any]:  # fmt: skip
    """What the command prints with --json, and writes to `out`: machine, versions, bandwidth_gb_s and rows.

    Before anything is measured raises ConfigError for sizes, counts and options that make no sense, DataError for data
    that hold no prompts, CheckpointError for a checkpoint that does not load.
    """
    check_out(out)
    data, sizes, batches = once(data), once(sizes), once(batches)
    temperatures, draft_vocabs = once(temperatures), once(draft_vocabs)
    if checkpoint is None and not sizes:
        raise ConfigError("nothing to time: name a checkpoint, or a --size")
    if checkpoint is None:
        own = {"data": data, "split-field": split_field, "prompt-field": prompt_field, "prompts": prompts}
        _none_of({**own, "random-heads": random_heads or None}, "a checkpoint: name one")
    if not sizes:
        _none_of({"head-kind": head_kind, "n-future": n_future, "context": context}, "random weights: name a --size")
    n_future, context = 4 if n_future is None else n_future, 512 if context is None else context
    prompts = max(8, *batches) if prompts is None else prompts
    _at_least(2, tokens=tokens)
    _at_least(1, rounds=rounds, prompts=prompts, context=context, n_future=n_future, batch=min(batches))
    if dtype not in DTYPES:
        raise ConfigError(f"dtype {dtype}: must be one of {', '.join(DTYPES)}")
    if eager and device == "cpu" and library() is None:
        raise ConfigError("--eager: nothing is compiled here, so that all steps are PyTorch's: leave it out")
    cases = [
        random_case(
            size, n_future, head_kind or "parallel", DTYPES[dtype], device, batches, temperatures or (0.0,), context,
            tokens, draft_vocabs,
        )
        for size in sizes
    ]  # fmt: skip
    if checkpoint is not None:
        case = checkpoint_case(
            checkpoint, data, split_field, prompt_field, dtype, device, batches, temperatures or (0.0, 0.8), prompts,
            tokens, random_heads, draft_vocabs,
        )  # fmt: skip
        cases.insert(0, case)
    display.say("Measuring memory bandwidth")
    gb_s, rows = bandwidth(device), list[dict[str, Any]]()
    while cases:
        rows += bench(cases.pop(0), rounds, peers, draft_vocabs, eager, gb_s, display)  # whose model is then freed
    result = {
        "machine": {**machine(), "device": device},
        "versions": versions(),
        "bandwidth_gb_s": gb_s,
        "bandwidth_measured": "sums of 16 rows of float32 numbers (256 MiB, of a GPU 4 GiB), best of 10",
        "rows": rows,
    }
    if out is not None:
        write_json(out, result)
    return result


def _at_least(least: int, **counts: int) -> None:
    for name, value in counts.items():
        if value < least:
            raise ConfigError(f"{name} = {value} must be at least {least}")


def _none_of(options: dict[str, object], of: str) -> None:
    """Raises ConfigError for options that would be passed over."""
    for name, value in options.items():
        if value not in (None, ()):
            raise ConfigError(f"--{name} is of {of}, or leave it out")


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
