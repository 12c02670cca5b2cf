"""The benchmarks of decoding and training: what they time is what they say, and their figures hang together."""

from __future__ import annotations

import json
import math
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_model
from test_cli import Run, run, wrong  # noqa: F401 - a fixture

from foretoken import bench_cases, bench_decode, bench_peers, bench_train
from foretoken.bench import PLAIN, Way, compare, distinct_ngrams, held_out_prompts
from foretoken.bench_peers import Workload
from foretoken.checkpoint import save_checkpoint
from foretoken.display import Display
from foretoken.kernels import library
from foretoken.lab import acceptance, retrofit
from foretoken.model import Model
from foretoken.native import Native
from foretoken.pace import MOST_NODES
from foretoken.tokenizer import byte_tokenizer

KEYS = {
    "model", "parameters", "dtype", "domain", "temperature", "batch", "context", "decoder", "drafts", "ms_per_step",
    "tokens_per_step", "ms_per_token", "runs", "min", "max", "step_cost", "speedup", "fraction_of_bound", "differing",
    "margin",
}  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tiny_model(vocab=260, dtype=torch.float32, peaked=False, seed=3)
    return save_checkpoint(tmp_path_factory.mktemp("bench") / "model", model, byte_tokenizer())


@pytest.fixture
def small_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(bench_cases.SHAPES, "30m", (64, 3, 2, 128))
    monkeypatch.setattr(bench_cases, "VOCABULARY", 300)
    monkeypatch.setattr(bench_decode, "bandwidth", lambda _: 20.0)


@pytest.fixture
def unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is wrong is to be said before anything is timed."""

    def early(*_: object) -> float:
        raise AssertionError("measured before the options were checked")

    monkeypatch.setattr(bench_train, "product_tflops", early)
    monkeypatch.setattr(bench_decode, "bandwidth", early)


def texts(folder: Path) -> Path:
    for i in range(3):
        (folder / f"{i}.py").write_text(f"def read_{i}(path):\n    return open(path).read()\n" * 30)
    return folder


def rows_add_up(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        assert set(row) == KEYS
        assert 0 < row["min"] <= row["ms_per_step"] <= row["max"]
        assert row["step_cost"] > 0
        assert (row["tokens_per_step"] is None) == (row["ms_per_token"] is None) == (row["speedup"] is None)
        if row["decoder"] == "foretoken" and row["drafts"] == 0:
            assert row["step_cost"] == row["tokens_per_step"] == row["speedup"] == 1.0
            assert row["differing"] == 0.0
        bytes_per_step = row["parameters"] * (2 if row["dtype"] == "bfloat16" else 4)
        assert row["fraction_of_bound"] == pytest.approx(bytes_per_step / 20e9 / row["ms_per_step"] * 1e3)


@pytest.mark.parametrize("kind", ["parallel", "sequential"])
def test_random_weights(small_shape: None, run: Run, kind: str, tmp_path: Path) -> None:  # noqa: F811
    out = tmp_path / "result.json"
    options = [
        "--batch",
        1,
        "--batch",
        2,
        "--draft-vocab",
        99,
        "--context",
        20,
        "--tokens",
        5,
        "--rounds",
        2,
        "--head-kind",
        kind,
    ]
    done = run("bench", "decode", "--size", "30m", *options, "--no-peers", "--out", out, "--json")
    result = done.json
    assert json.loads(out.read_text()) == result
    assert set(result) == {"machine", "versions", "bandwidth_gb_s", "bandwidth_measured", "rows"}
    assert set(result["versions"]) >= {"foretoken", "torch", "transformers", "xllamacpp"}
    rows_add_up(result["rows"])
    shown = [(row["batch"], row["decoder"], row["drafts"]) for row in result["rows"]]
    ways = [("foretoken", 0)]
    ways += [way for k in (1, 2, 3) for way in (("foretoken", k), ("foretoken, drafts of 99 tokens", k))]
    ways += [("foretoken, tree of 5", 3), ("foretoken, tree of 8", 3)]
    assert shown == [(batch, *way) for batch in (1, 2) for way in ways]
    for row in result["rows"]:  # acceptance means nothing where K is given
        assert (row["tokens_per_step"] is None) == bool(row["drafts"])
    assert all(row["differing"] == 0.0 for row in result["rows"])
    assert {row["runs"] for row in result["rows"]} == {2}


def test_heads_that_are_spoilt(run: Run, checkpoint: Path, tmp_path: Path, small_shape: None) -> None:  # noqa: F811
    """Their drafts are refused, and that is what these rows are for; the output stays."""
    options = ["--data", texts(tmp_path), "--random-heads", "--tokens", 40, "--prompts", 4, "--rounds", 1, "--no-peers"]
    rows = run("bench", "decode", checkpoint, *options, "--temperature", 0, "--json").json["rows"]
    assert all("random" in row["model"] and row["differing"] == 0.0 for row in rows)
    (drafted,) = (row for row in rows if row["drafts"] == 3 and "tree" not in row["decoder"])
    assert drafted["tokens_per_step"] < 1.5


def test_a_checkpoint_on_its_text(run: Run, checkpoint: Path, tmp_path: Path, small_shape: None) -> None:  # noqa: F811
    data = texts(tmp_path)
    options = ["--data", data, "--tokens", 6, "--prompts", 2, "--rounds", 1, "--no-peers", "--dtype", "float32"]
    rows = run("bench", "decode", checkpoint, *options, "--json").json["rows"]
    rows_add_up(rows)
    greedy = [row["decoder"] for row in rows if row["temperature"] == 0]
    trees = ["foretoken, tree of 5", "foretoken, tree of 8"]
    assert greedy == [*["foretoken"] * 4, *trees, "foretoken, as many drafts as pay", "foretoken, lookup"]
    sampled = [row for row in rows if row["temperature"] == 0.8]
    assert [row["decoder"] for row in sampled].count("foretoken, rejection") == 3
    for row in rows:
        assert 1 <= row["tokens_per_step"] <= 9
        assert row["differing"] == (None if "rejection" in row["decoder"] else 0.0)
        assert row["ms_per_token"] == pytest.approx(row["ms_per_step"] / row["tokens_per_step"], rel=0.2)
    shown = run("bench", "decode", checkpoint, *options).out
    assert len([line for line in shown.splitlines() if line.startswith("|")]) == 2 + len(rows)


def test_records_that_are_prompts(run: Run, checkpoint: Path, tmp_path: Path, small_shape: None) -> None:  # noqa: F811
    """Whole ones, spread over the file; of a long one the end that the model has room for."""
    records = [{"turns": [f"Question {i}?", "And then?"]} for i in range(9)] + [{"turns": ["x" * 900]}]
    data = tmp_path / "questions.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    options = ["--data", data, "--prompt-field", "turns", "--tokens", 6, "--prompts", 2, "--rounds", 1, "--no-peers"]
    rows = run("bench", "decode", checkpoint, *options, "--temperature", 0, "--json").json["rows"]
    assert {row["context"] for row in rows} == {1 + len("Question 0?\n\nAnd then?")}
    assert {row["domain"] for row in rows} == {"questions.jsonl"}
    rows = run("bench", "decode", checkpoint, *options, "--temperature", 0, "--prompts", 10, "--json").json["rows"]
    assert {row["context"] for row in rows} == {round((9 * 23 + 250) / 10)}
    wrong = run("bench", "decode", checkpoint, *options, "--prompt-field", "text")
    assert wrong.code == 2
    assert "no field 'text'; the record has turns" in wrong.errors


def test_peers_decode_the_same(checkpoint: Path) -> None:
    """Each is given the same weights and prompts, and writes as many tokens."""
    pytest.importorskip("transformers")
    pytest.importorskip("xllamacpp")
    from foretoken.checkpoint import load_checkpoint

    model, _ = load_checkpoint(checkpoint, "float32")
    prompts = [[65, 66, 67, 68], [1, 2, 3, 4], [9, 8, 7, 6]]
    work = Workload("text", prompts[:2], 1, 5)
    found = list(bench_peers.decoders(model, checkpoint, work, [1], True, True))
    names = [name for name, _, _ in found]
    assert names[-3:] == ["transformers", "transformers, prompt lookup", "llama.cpp"]
    for name, _, decoder in found:
        timing = decoder()
        assert timing.seconds > 0
        assert 0 < timing.steps <= 8, name
        assert timing.tokens == 8, name  # the first of each prompt's five is in no time
    for name, _, decoder in bench_peers.decoders(model, checkpoint, Workload("text", prompts, 2, 5), [], True, False):
        timing = decoder()  # the last batch is not full
        assert (name, timing.steps, timing.row_steps, timing.tokens) == (name, 8, 12, 12)


@pytest.mark.skipif(library() is None, reason="needs compiled steps")
def test_steps_of_both_forms_in_one_run(run: Run, checkpoint: Path, tmp_path: Path, small_shape: None) -> None:  # noqa: F811
    options = ["--data", texts(tmp_path), "--tokens", 20, "--prompts", 2, "--batch", 2, "--rounds", 1, "--no-peers"]
    rows = run("bench", "decode", checkpoint, *options, "--temperature", 0, "--eager", "--json").json["rows"]
    rows_add_up(rows)
    eager = [row for row in rows if row["decoder"].startswith(bench_peers.EAGER)]
    ways = [(row["decoder"].removeprefix(bench_peers.EAGER), row["drafts"]) for row in eager]
    assert ways == [("", 0), ("", 1), ("", 2), ("", 3), (", as many drafts as pay", None)]
    assert {row["dtype"] for row in rows} == {"bfloat16"}
    assert eager[0]["differing"] == 0.0  # of each form beside its own plain steps
    assert eager[0]["tokens_per_step"] == 1.0
    assert eager[0]["step_cost"] != 1.0


def test_both_forms_read_the_same_weights(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from foretoken.checkpoint import load_checkpoint

    model, _ = load_checkpoint(checkpoint, "float32")
    compiled, work = model.stepper(), Workload("text", [[65, 66, 67, 68], [1, 2, 3]], 2, 12)
    eager = bench_peers.eager(model)
    assert eager.native is None
    one = bench_peers.foretoken_decoder(model, work, 2)()
    with monkeypatch.context() as without:
        without.setattr(Native, "turn", None)
        two = bench_peers.foretoken_decoder(model, work, 2, stepper=eager)()
    assert [r.ids for r in one.requests] == [r.ids for r in two.requests]
    assert model.stepper() is compiled
    assert eager.current(model)
    assert (compiled.native is None) == (library() is None)


def test_eager_steps_where_nothing_is_compiled(
    run: Run,  # noqa: F811
    small_shape: None,
    unmeasured: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bench_decode, "library", lambda: None)
    wrong(run("bench", "decode", "--size", "30m", "--device", "cpu", "--eager"), "--eager: nothing is compiled here")


def test_domains_are_told_apart() -> None:
    sources = ["a/x.jsonl", "b/x.jsonl", "a/y.jsonl", "hf:org/name", "stdlib"]
    shown = ["a/x.jsonl", "b/x.jsonl", "y.jsonl", "hf:org/name", "stdlib"]
    assert [bench_cases._domain(source, sources) for source in sources] == shown
    assert bench_cases._domain("", []) == "held out"


CHECKPOINT, SHORT, LONG = "the checkpoint", "short.txt", "long.txt"
MISTAKES: list[tuple[list[object], str]] = [
    ([], "nothing to time: name a checkpoint, or a --size"),
    (["--size", "huge"], "size huge: must be one of"),
    (["--size", "30m", "--tokens", 1], "tokens = 1 must be at least 2"),
    (["--size", "30m", "--batch", 0], "batch = 0 must be at least 1"),
    (["--size", "30m", "--rounds", 0], "rounds = 0 must be at least 1"),
    (["--size", "30m", "--draft-vocab", 0], "draft_vocab = 0 must lie between 1 and the model's 300 tokens"),
    (["--size", "30m", "--dtype", "int4"], "dtype int4: must be one of"),
    (["--size", "30m", "--temperature", -1], "temperature = -1.0 must be 0 (greedy) or a positive number"),
    (["--size", "30m", "--head-kind", "horizontal"], "--head-kind, --n-future: head_kind: Input should be"),
    (
        ["--size", "30m", "--head-kind", "sequential", "--context", 1, "--tokens", 2],
        "drafts = 3, but a model of 3 positions drafts 0 to 2 tokens per step",
    ),
    (["--size", "30m", "--data", "README.md"], "--data is of a checkpoint: name one, or leave it out"),
    (["--size", "30m", "--split-field", "split"], "--split-field is of a checkpoint"),
    (["--size", "30m", "--prompt-field", "turns"], "--prompt-field is of a checkpoint"),
    (["--size", "30m", "--prompts", 8], "--prompts is of a checkpoint"),
    (["--size", "30m", "--random-heads"], "--random-heads is of a checkpoint"),
    ([CHECKPOINT, "--context", 64], "--context is of random weights: name a --size, or leave it out"),
    ([CHECKPOINT, "--n-future", 4], "--n-future is of random weights"),
    ([CHECKPOINT, "--head-kind", "parallel"], "--head-kind is of random weights"),
    ([CHECKPOINT, "--size", "huge"], "size huge: must be one of"),
    ([CHECKPOINT, "--data", SHORT], "short.txt: no text of more than 512 characters to take prompts from"),
    ([CHECKPOINT, "--data", LONG, "--data", SHORT], "short.txt: no text of more than 512 characters"),
    ([CHECKPOINT, "--data", LONG, "--tokens", 256], "tokens = 256 leaves no room for a prompt in the 256 positions of"),
    ([CHECKPOINT, "--data", LONG, "--tokens", 300], "tokens = 300 leaves no room for a prompt in the 256 positions of"),
    ([CHECKPOINT, "--data", LONG, "--batch", 4, "--prompts", 2], "batch = 4 is more than the 2 prompts of"),
    ([CHECKPOINT, "--data", LONG, "--draft-vocab", 900], "draft_vocab = 900 must lie between 1 and the model's 260"),
    (["/no/such/checkpoint"], "/no/such/checkpoint"),
]


@pytest.mark.parametrize(("words", "part"), MISTAKES, ids=[part[:40] for _, part in MISTAKES])
def test_mistakes(
    run: Run,  # noqa: F811
    small_shape: None,
    unmeasured: None,
    checkpoint: Path,
    tmp_path: Path,
    words: list[object],
    part: str,
) -> None:
    """In a line, before anything is measured."""
    (tmp_path / SHORT).write_text("def f(x):\n    return x\n")
    (tmp_path / LONG).write_text("def f(x):\n    return x\n" * 99)
    given = {CHECKPOINT: checkpoint, SHORT: tmp_path / SHORT, LONG: tmp_path / LONG}
    wrong(run("bench", "decode", *(given.get(str(word), word) for word in words)), part)


def test_heads_that_are_not_there_cannot_be_spoilt(run: Run, unmeasured: None, tmp_path: Path) -> None:  # noqa: F811
    model = tiny_model(vocab=260, n_future=1, dtype=torch.float32)
    folder = save_checkpoint(tmp_path / "plain", model, byte_tokenizer())
    wrong(run("bench", "decode", folder, "--random-heads"), "--random-heads: ", "has no further heads to spoil")


def test_what_is_named_twice_is_timed_once(run: Run, small_shape: None) -> None:  # noqa: F811
    options = ["--size", "30m", "--batch", 2, "--batch", 1, "--batch", 2, "--context", 9, "--tokens", 3, "--rounds", 1]
    rows = run("bench", "decode", *options, "--n-future", 1, "--no-peers", "--json").json["rows"]
    assert [row["batch"] for row in rows] == [2, 1]


def test_trees_are_no_larger_than_decoding_takes(run: Run, small_shape: None) -> None:  # noqa: F811
    options = ["--size", "30m", "--n-future", 17, "--context", 9, "--tokens", 3, "--rounds", 1, "--no-peers", "--json"]
    trees = [row["decoder"] for row in run("bench", "decode", *options).json["rows"] if "tree" in row["decoder"]]
    assert trees == ["foretoken, tree of 18"]


def test_bandwidth_is_a_machines() -> None:
    assert 0.5 < bench_decode.bandwidth("cpu") < 5000


def test_comparison_takes_the_prompts_reading_out(checkpoint: Path) -> None:
    from foretoken.checkpoint import load_checkpoint

    model, tokenizer = load_checkpoint(checkpoint, "float32")
    with Display(quiet_text=True) as display:
        found = compare(model, tokenizer, ["ab", "c"], 0.0, 9, 0, display, [Way(2), Way(None), PLAIN])
    for way, comparison in found.items():
        figures = comparison.figures()
        assert comparison.outputs_equal
        assert figures["speedup"] == pytest.approx(sum(comparison.plain_seconds) / sum(comparison.drafted_seconds))
        assert figures["drafts_per_step"] <= (MOST_NODES if way.drafts is None else way.drafts)
        assert all(math.isfinite(x) for x in figures["milliseconds_per_token"].values())
    assert found[PLAIN].figures()["tokens_per_step"] == 1.0


def test_prompts_and_ngrams() -> None:
    lines = "".join(f"line {i}\n" for i in range(200))
    prompts = held_out_prompts([lines, "short"], 3)
    assert len(set(prompts)) == 3
    assert all(prompt in lines and prompt.endswith("\n") for prompt in prompts)
    assert distinct_ngrams([[1, 2, 1, 2, 1, 2]], 2) == 2 / 5


def test_docs_hold_the_tables_of_the_stored_results() -> None:
    docs = Path(__file__).parents[1] / "docs"
    page = (docs / "decoding.md").read_text(encoding="utf-8")
    named = re.findall(r"<!-- the table of (results/decode-[a-z0-9-]+\.json) -->\n(.*?)\n<!-- end -->", page, re.S)
    assert len(named) == len(list((docs / "results").glob("decode-*.json"))) > 0
    for name, shown in named:
        stored = json.loads((docs / name).read_text(encoding="utf-8"))
        assert bench_decode.table(stored["rows"]) == shown
    stored = json.loads((docs / "results" / "acceptance.json").read_text(encoding="utf-8"))
    assert acceptance.table(stored) in page


def test_docs_hold_the_tables_of_the_stored_training_steps() -> None:
    docs = Path(__file__).parents[1] / "docs"
    page = (docs / "training.md").read_text(encoding="utf-8")
    named = re.findall(r"<!-- the table of (results/train-[a-z0-9.-]+\.json) -->\n(.*?)\n<!-- end -->", page, re.S)
    assert len(named) == len(list((docs / "results").glob("train-*.json"))) > 0
    for name, shown in named:
        stored = json.loads((docs / name).read_text(encoding="utf-8"))
        assert bench_train.table(stored["rows"]) == shown
    stored = json.loads((docs / "results" / "retrofit.json").read_text(encoding="utf-8"))
    assert f"<!-- the table of results/retrofit.json -->\n{retrofit.table(stored['arms'])}\n<!-- end -->" in page
    assert " ".join(page.split()).count(stored["command"]) == 1


@pytest.mark.skipif(not hasattr(torch.nn.functional, "linear_cross_entropy"), reason="needs torch 2.13")
def test_a_peers_loss_is_ours() -> None:
    config, gradients = bench_train.shape(50, 64, 4, 24, 3), []
    tokens = torch.randint(0, 50, (2, 27), generator=torch.Generator().manual_seed(0))
    for way in ("chunked", "torch"):
        model, step = bench_train.step_of(way, config, torch.float32, "cpu", False)
        step(tokens)
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], atol=1e-6), name


def test_a_peer_that_is_missing_is_said_so(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setitem(sys.modules, "liger_kernel.ops", None)
    bench_train.fused.cache_clear()
    wrong(run("bench", "train", "--way", "liger"), "way liger needs: pip install liger-kernel")


def test_training_steps(run: Run, tmp_path: Path) -> None:  # noqa: F811
    out = tmp_path / "train.json"
    options = ["--width", 64, "--blocks", 4, "--context", 32, "--batch", 2, "--rounds", 1, "--dtype", "float32"]
    command = ["bench", "train", "--vocabulary", 300, "--vocabulary", 40, "--heads", 1, "--heads", 3, *options]
    result = run(*command, "--out", out, "--json").json
    assert json.loads(out.read_text()) == result
    assert set(result) == {"machine", "versions", "product_tflops", "rows"}
    rows = result["rows"]
    ways = [(row["vocabulary"], row["way"], row["n"]) for row in rows]
    assert ways == [(v, way, n) for v in (300, 40) for way in bench_train.WAYS for n in (1, 3)]
    for row in rows:
        assert 0 < row["min"] <= row["ms"] <= row["max"]
        assert row["tokens_per_second"] == pytest.approx(64 / row["ms"] * 1e3)
        assert row["tflops"] == pytest.approx(row["flops"] / row["ms"] / 1e9)
        assert (row["ms_ratio"] == row["flops_ratio"] == 1.0) or row["n"] == 3
    shared, apart = (next(r for r in rows if r["way"] == way and r["n"] == 3) for way in ("chunked", "replicated"))
    assert apart["parameters"] - shared["parameters"] == 2 * 300 * 64  # a matrix for each further head
    assert len(run(*command).out.splitlines()) == 2 + len(rows)
    wrong(run(*command, "--way", "both"), "way both: must be one of")


SMALL_STEP = ["--vocabulary", 40, "--heads", 1, "--width", 64, "--blocks", 2, "--context", 8, "--rounds", 1]


def test_training_steps_named_twice_are_timed_once(run: Run) -> None:  # noqa: F811
    twice = ["--vocabulary", 40, "--heads", 2, "--heads", 1, "--way", "chunked", "--way", "naive", "--way", "chunked"]
    rows = run("bench", "train", *SMALL_STEP, *twice, "--json").json["rows"]
    assert [(row["way"], row["n"]) for row in rows] == [("chunked", 1), ("chunked", 2), ("naive", 1), ("naive", 2)]
    assert [row["ms_ratio"] == 1.0 for row in rows if row["n"] == 1] == [True, True]


@pytest.mark.parametrize("width", [65, 130])
def test_a_width_that_no_heads_share(run: Run, unmeasured: None, width: int) -> None:  # noqa: F811
    wrong(
        run("bench", "train", *SMALL_STEP, "--width", width), f"width = {width} gives attention heads an odd width, 65"
    )


def nowhere(folder: Path) -> list[tuple[Path, str]]:
    (folder / "file").write_text("here")
    missing = (folder / "none" / "out.json", f"there is no directory {folder / 'none'}")
    return [missing, (folder, "is a directory; name a file"), (folder / "file" / "out.json", "there is no directory")]


@pytest.mark.parametrize("command", [["train", *SMALL_STEP], ["decode", "--size", "30m"]], ids=["train", "decode"])
def test_a_result_that_cannot_be_written(
    run: Run,  # noqa: F811
    unmeasured: None,
    command: list[object],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for out, part in nowhere(tmp_path):
        wrong(run("bench", *command, "--out", out), f"--out {out}: {part}")
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)  # root may write anywhere
    for out in (tmp_path / "file", tmp_path / "new"):
        wrong(run("bench", *command, "--out", out), f"--out {out}: no permission to write there")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "here"


def test_memory_that_cannot_be_measured_is_no_number(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """As in a container where nobody may write to /proc/self/clear_refs."""
    write = Path.write_text

    def refused(path: Path, *words: Any, **named: Any) -> int:
        if path == Path("/proc/self/clear_refs"):
            raise PermissionError(13, "Permission denied", str(path))
        return write(path, *words, **named)

    monkeypatch.setattr(Path, "write_text", refused)
    (row,) = run("bench", "train", *SMALL_STEP, "--way", "chunked", "--json").json["rows"]
    assert row["peak_mib"] is row["peak_mib_ratio"] is None
    assert row["ms_ratio"] == 1.0
    shown = run("bench", "train", *SMALL_STEP, "--way", "chunked").out.splitlines()[-1]
    assert shown.count("| not measured ") == 2


def test_every_way_to_take_the_loss_is_the_same_loss() -> None:
    """Those with a shared unembedding give one gradient; the naive one is written apart from the package."""
    config = bench_train.shape(50, 64, 4, 24, 3)
    tokens = torch.randint(0, 50, (2, 27), generator=torch.Generator().manual_seed(0))
    gradients = []
    for way in ("chunked", "sequential", "naive"):
        model, step = bench_train.step_of(way, config, torch.float32, "cpu", False)
        step(tokens)
        gradients.append([p.grad for p in model.parameters()])
        assert all(grad is not None for grad in gradients[-1])
    for other in gradients[1:]:
        for a, b in zip(gradients[0], other, strict=True):
            assert torch.allclose(a, b, atol=1e-6)


def test_flops_are_those_of_the_matrices() -> None:
    config = bench_train.shape(100, 128, 4, 16, 2)
    weights = sum(p.numel() for name, p in Model(config).named_parameters() if p.dim() == 2 and "embed" not in name)
    attention = 4 * 12 * 128 * 16 / 2
    assert bench_train.flops(config, 1, 16) == 6 * (weights + 100 * 128) + attention  # head 2 unembeds too
