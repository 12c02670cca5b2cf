"""What `foretoken bench decode` times: our own decoding, transformers and llama.cpp, each on the same weights.

A decoder is a function that runs a workload once. Times are of what follows the first token: the prompt is not in them.
"""

from __future__ import annotations

import copy
import importlib.metadata
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch

from foretoken.decode import LARGEST_TREE, decode
from foretoken.drafters import Lookup, Source
from foretoken.errors import ForetokenError
from foretoken.formats.gguf import MODEL, export_gguf
from foretoken.model import Model, Stepper
from foretoken.request import Request
from foretoken.sampling import Accept, Sampling

EAGER = "foretoken, PyTorch"
GGUF_TYPES = {torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "f32"}


@dataclass(frozen=True)
class Timing:
    """One round of a decoder: seconds behind the first tokens, its steps, those of all rows together, its tokens, and
    our own requests."""

    seconds: float
    steps: int
    row_steps: int
    tokens: int
    requests: tuple[Request, ...] = ()


@dataclass(frozen=True)
class Workload:
    """Prompts that are decoded `batch` at a time, `tokens` further ones each, and what they are."""

    domain: str
    prompts: list[list[int]]
    batch: int
    tokens: int
    temperature: float = 0.0

    def batches(self) -> list[list[list[int]]]:
        """The prompts, `batch` at a time."""
        return [self.prompts[at : at + self.batch] for at in range(0, len(self.prompts), self.batch)]


Run = Callable[[], Timing]


def versions() -> dict[str, str | None]:
    """Versions of everything that is timed; None for what is not installed."""
    found: dict[str, str | None] = {}
    for name in ("foretoken", "torch", "transformers", "xllamacpp"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def foretoken_decoder(
    model: Model,
    work: Workload,
    drafts: int | None,
    accept: Accept = "keyed",
    source: Source = None,
    nodes: int | None = None,
    draft_vocab: int | None = None,
    stepper: Stepper | None = None,
) -> Run:
    """Our own decoding; stepper: by that form of the model."""

    def run() -> Timing:
        own = model.stepper()
        model.use_stepper(stepper or own)
        try:
            return timed()
        finally:
            model.use_stepper(own)

    def timed() -> Timing:
        seconds, steps, done = 0.0, 0, list[Request]()
        for prompts in work.batches():
            requests = [Request(list(prompt), work.tokens, seed) for seed, prompt in enumerate(prompts)]
            began = 0.0
            sampling = Sampling(work.temperature, accept=accept)
            options = {"source": source, "nodes": nodes, "draft_vocab": draft_vocab}
            for _ in decode(model, requests, sampling, drafts, **options):  # type: ignore[arg-type]
                if not began and requests[-1].ids:
                    began = time.perf_counter()  # the last prompt has been read
            seconds += time.perf_counter() - began
            steps += max(len(r.steps) for r in requests)
            done += requests
        taken = sum(len(r.steps) for r in done)
        return Timing(seconds, steps, taken, len(done) * (work.tokens - 1), tuple(done))

    return run


def eager(model: Model) -> Stepper:
    """The model's decoding form with nothing compiled. It reads the same memory, so that both stay in use."""
    stepper = copy.copy(model.stepper())
    stepper.native = stepper.graphs = None
    stepper.paces = {}
    return stepper


def transformers_decoder(
    folder: Path, work: Workload, dtype: torch.dtype, lookup: int, device: torch.device | str = "cpu"
) -> Run:
    """`generate` of transformers on the same directory; lookup: tokens of prompt lookup, 0 for none."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    model.to(device).eval()
    forwards = [0]
    model.register_forward_hook(lambda *_: forwards.__setitem__(0, forwards[0] + 1))

    @torch.no_grad()
    def seconds(prompts: list[list[int]], count: int) -> float:
        ids = torch.tensor(prompts, device=device)
        options: dict[str, Any] = {"prompt_lookup_num_tokens": lookup} if lookup else {}
        began = time.perf_counter()
        model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, min_new_tokens=count, do_sample=False,
            pad_token_id=0, eos_token_id=None, **options,
        )[0, -1].item()  # fmt: skip
        return time.perf_counter() - began

    def run() -> Timing:
        total, steps, row_steps = 0.0, 0, 0
        for prompts in work.batches():
            first = min(seconds(prompts, 1) for _ in range(2))  # the prompt and one token
            before = forwards[0]
            total += seconds(prompts, work.tokens) - first
            steps += forwards[0] - before - 1
            row_steps += len(prompts) * (forwards[0] - before - 1)
        return Timing(total, steps, row_steps, len(work.prompts) * (work.tokens - 1))

    return run


def llama_cpp_decoder(folder: Path, work: Workload, dtype: torch.dtype) -> Run:
    """llama.cpp in this process, on a GGUF file of the same weights.

    Its own clock begins with the first token, which the prompt's pass gave: that one is in its count, not in its time.
    """
    import xllamacpp

    out = folder.parent / "gguf"
    if not out.exists():
        export_gguf(folder, out, GGUF_TYPES[dtype], drafter=False)
    p = xllamacpp.CommonParams()
    longest = max(map(len, work.prompts))
    p.model.path, p.n_ctx, p.n_parallel, p.warmup = str(out / MODEL), longest + work.tokens + 8, 1, True
    p.cpuparams.n_threads = p.cpuparams_batch.n_threads = torch.get_num_threads()
    server = xllamacpp.Server(p)

    def run() -> Timing:
        milliseconds, tokens = 0.0, 0
        for prompt in work.prompts:
            answer = server.handle_completions(
                {
                    "prompt": prompt, "n_predict": work.tokens, "max_tokens": work.tokens, "temperature": 0,
                    "ignore_eos": True, "cache_prompt": False,
                }
            )  # fmt: skip
            timings = (json.loads(answer) if isinstance(answer, str) else answer)["timings"]
            milliseconds += timings["predicted_ms"]
            tokens += int(timings["predicted_n"]) - 1
        return Timing(milliseconds / 1e3, tokens, tokens, tokens)

    return run


def decoders(
    model: Model, folder: Path, work: Workload, drafts: Sequence[int], peers: bool, own_text: bool,
    draft_vocabs: Sequence[int] = (), not_compiled: bool = False,
) -> Iterator[tuple[str, int | None, Run]]:  # fmt: skip
    """(name, drafts, decoder) of all that is compared; peers that are not installed, or cannot run it, are left out.

    own_text: whether the model's text means anything, so that it says how many drafts pay. draft_vocabs: smaller
    vocabularies of drafts, which are timed beside the whole one. not_compiled: our steps in PyTorch, too.
    """
    yield "foretoken", 0, foretoken_decoder(model, work, 0)
    for k in drafts:
        for accept in get_args(Accept) if work.temperature > 0 else ("keyed",):
            name = f"foretoken, {accept}" if work.temperature > 0 else "foretoken"
            yield name, k, foretoken_decoder(model, work, k, accept)
        for size in draft_vocabs:
            yield f"foretoken, drafts of {size} tokens", k, foretoken_decoder(model, work, k, draft_vocab=size)
    if most := max(drafts, default=0):
        for nodes in (most + 2, 2 * most + 2):
            if nodes <= LARGEST_TREE:
                yield f"foretoken, tree of {nodes}", most, foretoken_decoder(model, work, most, nodes=nodes)
    if model.config.n_future > 1 and own_text:
        yield "foretoken, as many drafts as pay", None, foretoken_decoder(model, work, None)
    if own_text:
        yield "foretoken, lookup", None, foretoken_decoder(model, work, None, source=Lookup())
    if not_compiled:
        slow = eager(model)
        for k in (0, *drafts):
            yield EAGER, k, foretoken_decoder(model, work, k, stepper=slow)
        if model.config.n_future > 1 and own_text:
            yield f"{EAGER}, as many drafts as pay", None, foretoken_decoder(model, work, None, stepper=slow)
    if not peers or work.temperature > 0:
        return
    installed, dtype, device = versions(), model.dtype, model.device
    if installed["transformers"] and len({len(prompt) for prompt in work.prompts}) == 1:
        yield "transformers", 0, transformers_decoder(folder, work, dtype, 0, device)
        if work.batch == 1:
            lookup = max(drafts, default=3)
            yield "transformers, prompt lookup", lookup, transformers_decoder(folder, work, dtype, lookup, device)
    if installed["xllamacpp"] and device.type == "cpu" and work.batch == 1 and model.config.architecture == "llama":
        try:
            run = llama_cpp_decoder(folder, work, dtype)
        except ForetokenError:  # a model that GGUF files cannot hold
            return
        yield "llama.cpp", 0, run
