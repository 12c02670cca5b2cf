"""Greedy decoding with stock vLLM: `python vllm_runner.py REQUEST.json ANSWER.json`, in vLLM's environment.

The request: `model`, `prompts` (lists of ids), `tokens`, `speculative_config` (or null). The answer: `ids`, and what
vLLM's own counters say: `steps`, `drafted`, `accepted`, `by_position`.
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


def generate(request: dict[str, Any]) -> dict[str, Any]:
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=request["model"], dtype="float32", enforce_eager=True, max_model_len=256, max_num_seqs=8,
        disable_log_stats=False, speculative_config=request["speculative_config"],
    )  # fmt: skip
    sampling = SamplingParams(temperature=0, max_tokens=request["tokens"], ignore_eos=True)
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in request["prompts"]], sampling, use_tqdm=False)
    metrics = {metric.name: metric for metric in llm.get_metrics()}

    def counter(name: str, value: str = "value", default: Any = 0) -> Any:
        metric = metrics.get(f"vllm:spec_decode_num_{name}")
        return default if metric is None else getattr(metric, value)

    return {
        "ids": [list(output.outputs[0].token_ids) for output in outputs],
        "steps": counter("drafts"),
        "drafted": counter("draft_tokens"),
        "accepted": counter("accepted_tokens"),
        "by_position": counter("accepted_tokens_per_pos", "values", []),
    }


if __name__ == "__main__":
    os.environ.update(SETTINGS)
    Path(sys.argv[2]).write_text(json.dumps(generate(json.loads(Path(sys.argv[1]).read_text()))))
