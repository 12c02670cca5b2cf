"""Decoding with vLLM: `python vllm_runner.py REQUEST.json ANSWER.json`, in vLLM's environment.

The request is a list of engines, run one after the other in this process: `model`, `speculative_config` (or null),
further `options` of vllm.LLM, and `batches`, each of `prompts` (lists of ids) and `sampling`. The answer has for each
engine `ids` and `cached` (tokens of the prompt taken from the prefix cache) by batch, and what vLLM's own counters say:
`steps`, `drafted`, `accepted`, `by_position`; or, when it did not start, `error`.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
}
IN_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}


def run(request: dict[str, Any]) -> dict[str, Any]:
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    options = {
        "dtype": "float32", "enforce_eager": True, "max_model_len": 256, "max_num_seqs": 8,
        "disable_log_stats": False, "enable_prefix_caching": False, **request.get("options", {}),
    }  # fmt: skip
    try:
        llm = LLM(model=request["model"], speculative_config=request.get("speculative_config"), **options)
    except Exception as error:
        cleanup_dist_env_and_memory()
        return {"error": f"{type(error).__name__}: {error}"}
    ids, cached = [], []
    for batch in request["batches"]:
        prompts = [{"prompt_token_ids": prompt} for prompt in batch["prompts"]]
        outputs = llm.generate(prompts, SamplingParams(ignore_eos=True, **batch["sampling"]), use_tqdm=False)
        ids.append([list(sample.token_ids) for output in outputs for sample in output.outputs])
        cached.append([output.num_cached_tokens for output in outputs])
    counters = counts(llm.get_metrics())
    llm.llm_engine.engine_core.shutdown()
    del llm
    cleanup_dist_env_and_memory()
    return {"ids": ids, "cached": cached, **counters}


def counts(metrics: list[Any]) -> dict[str, Any]:
    by_name = {metric.name: metric for metric in metrics}

    def counter(name: str, value: str = "value", default: Any = 0) -> Any:
        metric = by_name.get(f"vllm:spec_decode_num_{name}")
        return default if metric is None else getattr(metric, value)

    return {
        "steps": counter("drafts"),
        "drafted": counter("draft_tokens"),
        "accepted": counter("accepted_tokens"),
        "by_position": counter("accepted_tokens_per_pos", "values", []),
    }


def repair_sampling() -> None:
    """On a CPU vLLM leaves what it expands from sequences to their drafts uninitialised: the same, in PyTorch."""
    import torch
    from vllm.v1.sample import rejection_sampler

    def expand(x: Any, ends: Any, tokens: int, replace_from: int = 0, replace_to: int = 0) -> Any:
        if replace_from != replace_to:
            x = torch.where(x == replace_from, torch.full_like(x, replace_to), x)
        return x.repeat_interleave(torch.diff(ends, prepend=ends.new_zeros(1)), output_size=tokens)

    rejection_sampler.expand_batch_to_tokens = expand


if __name__ == "__main__":
    os.environ.update(SETTINGS | IN_PROCESS)
    if "--repair-sampling" in sys.argv:
        repair_sampling()
    Path(sys.argv[2]).write_text(json.dumps([run(request) for request in json.loads(Path(sys.argv[1]).read_text())]))
