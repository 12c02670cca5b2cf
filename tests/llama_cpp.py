"""llama.cpp through `xllamacpp`, in float32 on one thread: what it writes and what it counts."""

from __future__ import annotations

import json
import platform
import sys
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

has_llama_cpp = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64", reason="xllamacpp has no wheel for this machine"
)


class LlamaCpp:
    """One model loaded, with a drafter where there is one."""

    def __init__(self, model: Path, drafter: Path | None = None, drafts: int = 0) -> None:
        import xllamacpp as x

        p = x.CommonParams()
        p.model.path, p.n_ctx, p.n_parallel, p.warmup = str(model), 256, 1, False
        p.cpuparams.n_threads = p.cpuparams_batch.n_threads = 1
        p.flash_attn_type = x.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        p.cache_type_k = p.cache_type_v = x.ggml_type.GGML_TYPE_F32
        if drafter is not None:
            kind = x.common_speculative_type.COMMON_SPECULATIVE_TYPE_DRAFT_EAGLE3
            p.speculative.types = [kind]
            d = p.speculative.draft
            d.mparams.path, d.n_max, d.n_min, d.p_min = str(drafter), drafts, 0, 0.0
            d.cpuparams.n_threads = d.cpuparams_batch.n_threads = 1
            d.cache_type_k = d.cache_type_v = x.ggml_type.GGML_TYPE_F32
        self.server = x.Server(p)

    def complete(self, prompt: str | Sequence[int], tokens: int) -> dict[str, Any]:
        """Greedy text behind a prompt; `content`, `tokens` (ids), and `timings` with draft_n and draft_n_accepted."""
        request = {
            "prompt": prompt if isinstance(prompt, str) else list(prompt), "n_predict": tokens, "max_tokens": tokens,
            "temperature": 0, "samplers": ["temperature"], "ignore_eos": True, "return_tokens": True,
            "cache_prompt": False,
        }  # fmt: skip
        answer = self.server.handle_completions(request)
        return json.loads(answer) if isinstance(answer, str) else answer

    def ids(self, prompt: Sequence[int], tokens: int) -> tuple[list[int], int]:
        """Greedy ids behind a prompt, and how many drafts were accepted on the way."""
        answer = self.post("completion", {
            "prompt": list(prompt), "n_predict": tokens, "temperature": 0, "samplers": ["temperature"],
            "ignore_eos": True, "return_tokens": True, "cache_prompt": False,
        })  # fmt: skip
        return answer["tokens"], answer["timings"].get("draft_n_accepted", 0)

    def logprobs(self, prompt: Sequence[int], tokens: int) -> list[tuple[int, float]]:
        """Greedy ids behind a prompt and their log-probabilities."""
        request = {"prompt": list(prompt), "n_predict": tokens, "temperature": 0, "n_probs": 1, "cache_prompt": False}
        answer = self.post("completion", request | {"samplers": ["temperature"]})
        return [(token["id"], token["logprob"]) for token in answer["completion_probabilities"]]

    def tokenize(self, text: str) -> list[int]:
        """Ids of `text`, bos in front where llama.cpp puts it."""
        ids = self.post("tokenize", {"content": text, "add_special": True, "parse_special": False})["tokens"]
        assert isinstance(ids, list)
        return ids

    def post(self, path: str, values: dict[str, Any]) -> dict[str, Any]:
        """The answer of the server's own routes."""
        address = f"{self.server.listening_address}/{path}"
        request = urllib.request.Request(address, json.dumps(values).encode(), {"Content-Type": "application/json"})
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=60) as answer:
            return json.load(answer)  # type: ignore[no-any-return]
