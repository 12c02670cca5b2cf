"""Stock vLLM on the CPU runs a checkpoint as it lies there, and its `mtp_heads/` as an EAGLE-3 drafter.

Its ids and its counters must be those of the oracle. One engine per test, each in a process of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import tiny_engine_model
from engine_oracle import Counts, count_drafts, greedy
from tiny_engine_model import TOKENS, prompt_ids

from foretoken.formats.eagle3 import export_eagle3
from foretoken.recipe import Recipe, load_recipe

PYTHON = os.environ.get("FORETOKEN_VLLM_PYTHON", "")
pytestmark = pytest.mark.skipif(not PYTHON, reason="vLLM has an environment of its own: make test-engines")
RUNNER = Path(__file__).with_name("vllm_runner.py")
MOST_DRAFTS = 3


def wider_heads(name: str, overrides: tuple[str, ...]) -> Recipe:
    """The tiny model's recipe with attention heads of width 32, the least that vLLM computes on a CPU."""
    return load_recipe(name, (*overrides, "model.head_dim=32"))


class Trained:
    """A checkpoint fresh from training, and what an engine must write from it."""

    def __init__(self, folder: Path, head_kind: str) -> None:
        with patch.object(tiny_engine_model, "load_recipe", wider_heads):
            self.folder = tiny_engine_model.make(folder, head_kind)
        self.prompts = prompt_ids()
        self.ahead = greedy(self.folder, self.prompts, TOKENS, MOST_DRAFTS)
        self.ids = [ids[:TOKENS] for ids in self.ahead]

    def counts(self, drafter: Path, drafts: int) -> Counts:
        outputs = [ids[: TOKENS + drafts] for ids in self.ahead]
        total, _ = count_drafts(self.folder, drafter, self.prompts, outputs, TOKENS, drafts)
        return total


@pytest.fixture(scope="module")
def sequential(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return Trained(tmp_path_factory.mktemp("sequential") / "model", "sequential")


@pytest.fixture(scope="module")
def parallel(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return Trained(tmp_path_factory.mktemp("parallel") / "model", "parallel")


def vllm(trained: Trained, scratch: Path, drafter: Path | None = None, drafts: int = 0) -> tuple[Any, Counts]:
    """The ids that stock vLLM writes, and its counters."""
    speculation = {"method": "eagle3", "model": str(drafter), "num_speculative_tokens": drafts} if drafter else None
    request, answer = scratch / "request.json", scratch / "answer.json"
    request.write_text(
        json.dumps(
            {
                "model": str(trained.folder),
                "prompts": trained.prompts,
                "tokens": TOKENS,
                "speculative_config": speculation,
            }
        )
    )
    log = scratch / "vllm.log"
    with log.open("w") as output:
        command = [PYTHON, str(RUNNER), str(request), str(answer)]
        done = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, timeout=900)
    assert done.returncode == 0, log.read_text()[-8000:]
    result = json.loads(answer.read_text())
    print(f"vLLM, {drafts} drafts a step:", {name: value for name, value in result.items() if name != "ids"})
    return result["ids"], Counts(result["steps"], result["drafted"], result["accepted"], result["by_position"])


def test_the_model_alone_writes_the_same_ids(sequential: Trained, tmp_path: Path) -> None:
    assert vllm(sequential, tmp_path) == (sequential.ids, Counts())


@pytest.mark.parametrize("drafts", [1, MOST_DRAFTS])
def test_a_sequential_head_drafts_from_the_checkpoint_as_it_is(
    sequential: Trained, tmp_path: Path, drafts: int
) -> None:
    drafter = sequential.folder / "mtp_heads"
    expected = sequential.counts(drafter, drafts)
    assert all(expected.by_position), "the oracle accepts nothing at some depth, so this would show little"
    assert vllm(sequential, tmp_path, drafter, drafts) == (sequential.ids, expected)


def test_head_2_of_parallel_heads_drafts_once_exported(parallel: Trained, tmp_path: Path) -> None:
    drafter = export_eagle3(parallel.folder, tmp_path / "eagle3")
    expected = parallel.counts(drafter, 1)
    assert 0 < expected.accepted < expected.drafted
    assert vllm(parallel, tmp_path, drafter, 1) == (parallel.ids, expected)
