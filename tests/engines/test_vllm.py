"""vLLM on the CPU runs a checkpoint as training left it; `mtp_heads/` drafts, parallel heads through foretoken-vllm.

Its ids and its counters must be those of the oracle. Engines that share a checkpoint run one after the other in one
process; the OpenAI server is started as users start it.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import tiny_engine_model
import torch
from engine_oracle import Counts, count_drafts, greedy, joint
from safetensors.torch import load_file, save_file
from scipy.stats import chi2
from tiny_engine_model import TOKENS, prompt_ids
from vllm_runner import SETTINGS

from foretoken.formats.eagle3 import export_eagle3
from foretoken.tokenizer import byte_tokenizer

PYTHON = os.environ.get("FORETOKEN_VLLM_PYTHON", "")
pytestmark = pytest.mark.skipif(not PYTHON, reason="vLLM has an environment of its own: make test-engines")
HERE = Path(__file__).parent
PLUGIN = HERE.parents[1] / "plugins" / "foretoken-vllm"
MOST_DRAFTS = 3
LATER = 32  # tokens that a second request goes on for behind the first one's
GREEDY = {"temperature": 0, "max_tokens": TOKENS}
SAMPLES, TEMPERATURE, JOINT = 6000, 0.5, 3

Answer = dict[str, Any]


class Trained:
    """A checkpoint fresh from training, and what an engine must write from it."""

    def __init__(self, folder: Path, head_kind: str, *overrides: str) -> None:
        # vLLM computes attention heads of width 32 and more on a CPU.
        self.folder = tiny_engine_model.make(folder, head_kind, more=("model.head_dim=32", *overrides))
        self.heads = self.folder / "mtp_heads"
        self.prompts = prompt_ids()
        self.ahead = greedy(self.folder, self.prompts, TOKENS + LATER, MOST_DRAFTS)
        self.ids = [ids[:TOKENS] for ids in self.ahead]

    def counts(self, drafter: Path, drafts: int, tokens: int = TOKENS, past: int = 0) -> Counts:
        """Of `tokens` tokens a prompt, behind the prompt and the first `past`."""
        prompts = [prompt + ids[:past] for prompt, ids in zip(self.prompts, self.ahead, strict=True)]
        outputs = [ids[past : past + tokens + drafts] for ids in self.ahead]
        return count_drafts(self.folder, drafter, prompts, outputs, tokens, drafts)[0]

    def engine(self, drafter: Path | None = None, drafts: int = 0, **request: Any) -> Answer:
        """What to ask vllm_runner.py for: by default the prompts, greedy."""
        speculation = {"method": "eagle3", "model": str(drafter), "num_speculative_tokens": drafts} if drafter else None
        batches = [{"prompts": self.prompts, "sampling": GREEDY}]
        return {"model": str(self.folder), "speculative_config": speculation, "batches": batches, **request}


def in_vllm() -> dict[str, str]:
    """The environment of vLLM's processes: this tree's plugin in front of the one installed."""
    path = os.pathsep.join((str(PLUGIN), os.environ.get("PYTHONPATH", "")))
    return {**os.environ, **SETTINGS, "PYTHONPATH": path}


def run_vllm(scratch: Path, engines: Sequence[Answer], *flags: str) -> list[Answer]:
    request, answer, log = scratch / "request.json", scratch / "answer.json", scratch / "vllm.log"
    request.write_text(json.dumps(engines))
    with log.open("w") as output:
        command = [PYTHON, str(HERE / "vllm_runner.py"), str(request), str(answer), *flags]
        done = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, timeout=900, env=in_vllm())
    assert done.returncode == 0, log.read_text()[-8000:]
    answers: list[Answer] = json.loads(answer.read_text())
    for engine, result in zip(engines, answers, strict=True):
        print(engine["speculative_config"], engine.get("options"), {k: v for k, v in result.items() if k != "ids"})
    return answers


def counted(answer: Answer) -> Counts:
    """vLLM's counters, of which those that accept nothing at some position, or everything, would show little."""
    counts = Counts(answer["steps"], answer["drafted"], answer["accepted"], answer["by_position"])
    assert all(counts.by_position)
    assert counts.accepted < counts.drafted or not counts.drafted
    return counts


@pytest.fixture(scope="module")
def sequential(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return Trained(tmp_path_factory.mktemp("sequential") / "model", "sequential")


@pytest.fixture(scope="module")
def parallel(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return Trained(tmp_path_factory.mktemp("parallel") / "model", "parallel")


def test_a_sequential_head_drafts_from_the_checkpoint_as_it_is(sequential: Trained, tmp_path: Path) -> None:
    """The plugin is there and stays out of it. First, the model alone."""
    drafts = (1, MOST_DRAFTS)
    engines = [sequential.engine(), *(sequential.engine(sequential.heads, k) for k in drafts)]
    plain, *drafted = run_vllm(tmp_path, engines)
    assert (plain["ids"], counted(plain)) == ([sequential.ids], Counts())
    for answer, k in zip(drafted, drafts, strict=True):
        assert (answer["ids"], counted(answer)) == ([sequential.ids], sequential.counts(sequential.heads, k))


def test_all_parallel_heads_draft_through_the_plugin(parallel: Trained, tmp_path: Path) -> None:
    """K = 1, 2, 3 from the checkpoint as it is, K = 3 also with every layer cut over two processes.

    And head 2, exported, in stock vLLM, which is K = 1 of all heads.
    """
    exported = export_eagle3(parallel.folder, tmp_path / "eagle3")
    drafts = (1, 2, 3, 3)
    engines = [parallel.engine(exported, 1), *(parallel.engine(parallel.heads, k) for k in drafts)]
    engines[-1]["options"] = {"tensor_parallel_size": 2}
    head_2, *drafted = run_vllm(tmp_path, engines)
    assert (head_2["ids"], counted(head_2)) == ([parallel.ids], parallel.counts(exported, 1))
    for answer, k in zip(drafted, drafts, strict=True):
        assert (answer["ids"], counted(answer)) == ([parallel.ids], parallel.counts(parallel.heads, k))
    assert counted(drafted[0]) == counted(head_2)


def test_heads_draft_alike_behind_cached_prefixes_and_as_many_as_the_load_allows(
    parallel: Trained, tmp_path: Path
) -> None:
    """One engine reads prompts in chunks of 24; a second request goes on where the first one ended, its start cached.

    The other drafts 1 token beside four or more requests and 3 beside fewer, as they are when some have ended.
    """
    heads, k = parallel.heads, MOST_DRAFTS
    longer = [prompt + ids for prompt, ids in zip(parallel.prompts, parallel.ids, strict=True)]
    batches = [
        {"prompts": parallel.prompts, "sampling": GREEDY},
        {"prompts": longer, "sampling": {"temperature": 0, "max_tokens": LATER}},
    ]
    options = {"enable_prefix_caching": True, "max_num_batched_tokens": 24, "block_size": 32}
    cached = parallel.engine(heads, k, batches=batches, options=options)
    paced = parallel.engine(heads, k)
    paced["speculative_config"]["num_speculative_tokens_per_batch_size"] = [[1, 3, k], [4, 8, 1]]

    answer, by_load = run_vllm(tmp_path, [cached, paced])
    assert all(32 <= tokens < len(prompt) - 24 for tokens, prompt in zip(answer["cached"][1], longer, strict=True))
    assert answer["ids"] == [parallel.ids, [ids[TOKENS : TOKENS + LATER] for ids in parallel.ahead]]
    assert counted(answer) == parallel.counts(heads, k) + parallel.counts(heads, k, tokens=LATER, past=TOKENS)
    assert by_load["ids"] == [parallel.ids]
    assert by_load["steps"] < by_load["drafted"] < k * by_load["steps"]


# Two heads of width 32: vLLM's Qwen2 derives the width.
ARCHITECTURES = {
    "mistral": (),
    "qwen2": ("model.num_attention_heads=2", "model.num_key_value_heads=1"),
    "qwen3": ("model.tie_word_embeddings=true",),
}


def test_heads_are_layers_of_the_models_own_kind(tmp_path: Path) -> None:
    models = [
        Trained(tmp_path / name / "model", "parallel", f"model.architecture={name}", *overrides)
        for name, overrides in ARCHITECTURES.items()
    ]
    answers = run_vllm(tmp_path, [model.engine(model.heads, MOST_DRAFTS) for model in models])
    for model, answer in zip(models, answers, strict=True):
        assert (answer["ids"], counted(answer)) == ([model.ids], model.counts(model.heads, MOST_DRAFTS))


def test_samples_follow_the_models_law(parallel: Trained, tmp_path: Path) -> None:
    """With vLLM's expansion to drafts repaired, which on a CPU reads uninitialised memory. First without drafts."""
    sampling = {"temperature": TEMPERATURE, "max_tokens": JOINT + 2, "n": SAMPLES}
    request = {
        "batches": [{"prompts": parallel.prompts[:1], "sampling": sampling}],
        "options": {"max_num_seqs": 256, "seed": 1},
    }
    engines = [parallel.engine(**request), parallel.engine(parallel.heads, MOST_DRAFTS, **request)]
    plain, drafted = run_vllm(tmp_path, engines, "--repair-sampling")
    assert plain["accepted"] == 0 < drafted["accepted"] < drafted["drafted"]
    law = joint(parallel.folder, parallel.prompts[0], TEMPERATURE, JOINT, least=8 / SAMPLES)
    for answer in (plain, drafted):
        assert distance(answer["ids"][0], law) < 4


def distance(samples: Sequence[Sequence[int]], law: dict[tuple[int, ...], float]) -> float:
    """How far the samples' first tokens are from the law, in standard deviations: chi-square, Wilson and Hilferty's."""
    seen = dict.fromkeys(law, 0)
    for sample in samples:
        if (start := tuple(sample[:JOINT])) in seen:
            seen[start] += 1
    cells = [(seen[start], probability) for start, probability in law.items()]
    cells.append((len(samples) - sum(seen.values()), 1 - sum(law.values())))
    square = sum((n - len(samples) * p) ** 2 / (len(samples) * p) for n, p in cells)
    freedom = len(cells) - 1
    print(f"chi-square {square:.1f} on {freedom}, p = {chi2.sf(square, freedom):.4f}")
    assert freedom > 20
    return ((square / freedom) ** (1 / 3) - 1 + 2 / (9 * freedom)) / (2 / (9 * freedom)) ** 0.5


def test_what_does_not_fit_stops_at_the_start(parallel: Trained, tmp_path: Path) -> None:
    weights = load_file(parallel.heads / "model.safetensors")
    config = json.loads((parallel.heads / "config.json").read_text())
    less = {name: weight for name, weight in weights.items() if name != "heads.1.self_attn.k_proj.weight"}
    up, first = "heads.2.mlp.up_proj.weight", weights["heads.0.mlp.up_proj.weight"].clone()

    def other(name: str, weights: dict[str, torch.Tensor], **values: Any) -> Path:
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({**config, **values}))
        save_file(weights, tmp_path / name / "model.safetensors")
        return tmp_path / name

    wrong = {
        "num_speculative_tokens = 4, but the checkpoint has 3 heads": (parallel.heads, 4),
        "width 128 = 3 heads and vocabulary 260 beside a model of width 64": (other("a", weights, hidden_size=128), 3),
        "mtp_heads/ lacks heads.1.self_attn.k_proj.weight": (other("b", less), 3),
        "mtp_heads/ holds unknown lm_head.weight": (other("c", {**weights, "lm_head.weight": torch.zeros(260, 64)}), 3),
        f"mtp_heads/ {up} equals that of heads.0: it was copied": (other("d", {**weights, up: first}), 3),
        f"mtp_heads/ {up} is all zero": (other("e", {**weights, up: torch.zeros_like(first)}), 3),
    }
    results = run_vllm(tmp_path, [parallel.engine(*drafter) for drafter in wrong.values()])
    for message, result in zip(wrong, results, strict=True):
        assert message in result["error"]


@contextmanager
def server(folder: Path, speculation: dict[str, Any], log: Path) -> Iterator[str]:
    """The address of an OpenAI server, as `vllm serve` starts it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--served-model-name", "tiny",
        "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager", "--max-model-len", "256",
        "--max-num-seqs", "8", "--speculative-config", json.dumps(speculation),
    ]  # fmt: skip
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=in_vllm(), start_new_session=True)
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 300
        while not answers(f"{url}/health"):
            assert process.poll() is None, log.read_text()[-8000:]
            assert time.monotonic() < deadline, log.read_text()[-8000:]
            time.sleep(1)
        yield url
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def get(url: str) -> str:
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=60) as answer:
        return str(answer.read().decode())


def answers(url: str) -> bool:
    try:
        get(url)
    except OSError:
        return False
    return True


def test_the_openai_server_counts_what_the_oracle_does(parallel: Trained, tmp_path: Path) -> None:
    request, answer = tmp_path / "request.json", tmp_path / "answer.json"
    request.write_text(json.dumps({"prompts": parallel.prompts, "tokens": TOKENS}))
    speculation = parallel.engine(parallel.heads, MOST_DRAFTS)["speculative_config"]
    with server(parallel.folder, speculation, tmp_path / "server.log") as url:
        command = [PYTHON, str(HERE / "openai_runner.py"), url, str(request), str(answer)]
        subprocess.run(command, check=True, timeout=300, env={**os.environ, "NO_PROXY": "127.0.0.1"})
        metrics = get(f"{url}/metrics")
    got = json.loads(answer.read_text())
    assert got["models"] == ["tiny"]
    assert got["ids"] == parallel.ids
    assert got["texts"] == [byte_tokenizer().decode(ids) for ids in parallel.ids]
    assert got["usage"] == [TOKENS] * 3
    total = {
        (name, position): int(float(value))
        for name, position, value in re.findall(
            r'^vllm:spec_decode_num_(\w+)_total\{.*?(?:position="(\d+)")?\} (\S+)$', metrics, re.MULTILINE
        )
    }
    by_position = [total["accepted_tokens_per_pos", str(i)] for i in range(MOST_DRAFTS)]
    counts = Counts(total["drafts", ""], total["draft_tokens", ""], total["accepted_tokens", ""], by_position)
    assert counts == parallel.counts(parallel.heads, MOST_DRAFTS)
    assert all(by_position)
    log = (tmp_path / "server.log").read_text()
    assert log.count("foretoken-vllm: on a CPU, vLLM samples wrongly") == 1
