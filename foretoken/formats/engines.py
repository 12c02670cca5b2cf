"""Which engine runs what of a checkpoint, and how it is told to: the one place that knows the commands."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from foretoken.checkpoint import HEADS, find_checkpoint, read_config
from foretoken.config import ModelConfig
from foretoken.errors import CheckpointError
from foretoken.formats import hf
from foretoken.formats.eagle3 import require_eagle3
from foretoken.formats.gguf import DRAFTER, MODEL, require_gguf
from foretoken.tokenizer import load as load_tokenizer


@dataclass(frozen=True)
class Use:
    """One thing that an engine does with a checkpoint.

    runs: the part of the model. drafts: tokens a step that are advised, 0 for plain decoding. commands: what to type,
    in this order; none where it cannot be done, and then `reason` says why. tested: how this is known.
    """

    engine: str
    runs: str
    drafts: int
    commands: tuple[str, ...]
    tested: str
    reason: str = ""

    def to_json(self) -> dict[str, Any]:
        """As `foretoken info --engines --json` prints it."""
        return {**asdict(self), "commands": list(self.commands), "works": not self.reason}


def uses(checkpoint: str | Path) -> list[Use]:
    """All that engines can do with `checkpoint`, and what they cannot, by engine."""
    folder = find_checkpoint(checkpoint)
    config = read_config(folder)
    found = [*_plain(folder, config)]
    if config.n_future > 1:
        found += _drafting(folder, config)
    order = ("foretoken", "transformers", "vllm", "llama_cpp", "sglang", "tensorrt_llm", "mlx_lm")
    return sorted(found, key=lambda use: order.index(use.engine))


def _plain(folder: Path, config: ModelConfig) -> Iterator[Use]:
    ckpt, runs = shlex.quote(str(folder)), "next-token path"
    yield Use("foretoken", runs, 0, (f'foretoken generate {ckpt} "..." --drafts 0',), "make test")
    load = f'AutoModelForCausalLM.from_pretrained("{folder}").generate(ids)'
    yield Use("transformers", runs, 0, (load,), "make test")
    yield Use("vllm", runs, 0, (f"vllm serve {ckpt}",), "make test-engines")
    yield _gguf_use(folder, config, runs, 0)
    yield Use("sglang", runs, 0, (f"python -m sglang.launch_server --model-path {ckpt}",), "not run")
    yield Use("tensorrt_llm", runs, 0, (f"trtllm-serve {ckpt}",), "not run")
    yield Use("mlx_lm", runs, 0, (f"mlx_lm.generate --model {ckpt} --prompt '...'",), "run once")


def _drafting(folder: Path, config: ModelConfig) -> Iterator[Use]:
    ckpt, sequential = shlex.quote(str(folder)), config.sequential
    most = config.n_future - 1
    every = "sequential head" if sequential else f"heads 2..{config.n_future}" if most > 1 else "head 2"
    # an EAGLE-3 drafter has one unembedding, be it the model's or head 2's
    stock, drafts = (every, most) if config.goes_on else ("head 2", 1)
    yield Use("foretoken", every, most, (f'foretoken generate {ckpt} "..."',), "make test")
    if not config.portable:
        reason = f"{folder}: {config.head_kind} heads are for foretoken alone"
        for engine in ("transformers", "vllm", "llama_cpp", "sglang", "tensorrt_llm"):
            yield Use(engine, every, most, (), "make test", reason)
        return
    out = Path(f"{folder}-hf")
    export = f"foretoken export hf {ckpt} {shlex.quote(str(out))}"
    yield Use("transformers", every, most, (export, *hf_commands(out).values()), "make test")
    serve = vllm_command(folder, folder / HEADS, most)
    if config.own_unembeddings:
        reason = f"{folder}: heads with unembeddings of their own; vLLM lets mtp_heads/ use the model's alone"
        yield Use("vllm", every, most, (), "make test", reason)
    elif sequential:
        yield Use("vllm", every, most, (serve,), "make test-engines")
    else:
        yield Use("vllm", every, most, ("pip install ./plugins/foretoken-vllm", serve), "make test-engines")
    yield _gguf_use(folder, config, stock, drafts)
    out, reason = Path(f"{folder}-eagle3"), ""
    export = f"foretoken export eagle3 {ckpt} {shlex.quote(str(out))}"
    try:
        require_eagle3(config, str(folder))
    except CheckpointError as error:
        reason = str(error)
    commands = eagle3_commands(folder, out)
    for engine, tested in (("vllm", "make test-engines"), ("sglang", "names only"), ("tensorrt_llm", "names only")):
        if engine == "vllm" and config.goes_on:
            continue  # mtp_heads/ is that drafter
        tested = "names only" if config.own_unembeddings else tested
        yield Use(engine, stock, drafts, () if reason else (export, commands[engine]), tested, reason)


def _gguf_use(folder: Path, config: ModelConfig, runs: str, drafts: int) -> Use:
    out, reason = Path(f"{folder}-gguf" if drafts else f"{folder}-plain-gguf"), ""
    files = [str(out / MODEL), str(out / DRAFTER)]
    try:
        require_gguf(config, load_tokenizer(folder), "bf16", drafts > 0, str(folder))
    except CheckpointError as error:
        reason = str(error)
    alone = " --no-drafter" if config.n_future > 1 and not drafts else ""
    export = f"foretoken export gguf {shlex.quote(str(folder))} {shlex.quote(str(out))}{alone}"
    commands = (export, gguf_command(folder, files if drafts else files[:1]))
    return Use("llama_cpp", runs, drafts, () if reason else commands, "make test", reason)


def drafts_to_make(checkpoint: str | Path) -> int:
    """Drafts per step that stock engines do well with: head 2 of parallel heads drafts one token well, not more, and so
    does a sequential head with the first of its unembeddings."""
    config = read_config(find_checkpoint(checkpoint))
    return config.n_future - 1 if config.goes_on else 1


def vllm_command(checkpoint: Path, drafter: Path, drafts: int) -> str:
    """How vLLM serves a checkpoint with a drafter. The method is given because vLLM else guesses it from names."""
    speculative = {"method": "eagle3", "model": str(drafter), "num_speculative_tokens": drafts}
    return f"vllm serve {shlex.quote(str(checkpoint))} --speculative-config {shlex.quote(json.dumps(speculative))}"


def eagle3_commands(checkpoint: str | Path, drafter: Path) -> dict[str, str]:
    """How each engine is told of the drafter that `export_eagle3` wrote."""
    folder, drafts = find_checkpoint(checkpoint), drafts_to_make(checkpoint)
    layers = ", ".join(map(str, hf.aux_outputs(read_config(folder))))
    return {
        "vllm": vllm_command(folder, drafter, drafts),
        "sglang": f"python -m sglang.launch_server --model-path {shlex.quote(str(folder))} "
        f"--speculative-algorithm EAGLE3 --speculative-draft-model-path {shlex.quote(str(drafter))} "
        f"--speculative-num-steps {drafts} --speculative-eagle-topk 1 --speculative-num-draft-tokens {drafts + 1}",
        "tensorrt_llm": f'Eagle3DecodingConfig(max_draft_len={drafts}, speculative_model="{drafter}", '
        f"eagle3_layers_to_capture={{{layers}}})",
    }


def gguf_command(checkpoint: str | Path, files: list[str]) -> str:
    """How llama.cpp's server is started on the files that `export_gguf` wrote."""
    command = f"llama-server -m {shlex.quote(files[0])}"
    if len(files) == 1:
        return command
    draft = f"--spec-type draft-eagle3 -md {shlex.quote(files[1])}"
    return f"{command} {draft} --spec-draft-n-max {drafts_to_make(checkpoint)} --spec-draft-p-min 0"


def hf_commands(out: str | Path) -> dict[str, str]:
    """How transformers drafts from the directory that `export_hf` wrote."""
    load = f'AutoModelForCausalLM.from_pretrained("{out}", trust_remote_code=True)'
    return {"transformers": f"{load}.generate(ids, use_mtp=True)"}
