"""The transformers class: it drafts with all heads as the oracle does, and writes what plain decoding writes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_model
from hf_class_worker import counted
from safetensors.torch import load_file, save_file
from tiny_engine_model import TOKENS
from trained_models import DRAFTS, KINDS, Trained
from transformers import AutoModelForCausalLM

import foretoken
from foretoken.checkpoint import load_checkpoint, save_checkpoint
from foretoken.errors import CheckpointError, ConfigError
from foretoken.formats.hf_class import export_hf
from foretoken.tokenizer import byte_tokenizer

WORKER = Path(__file__).with_name("hf_class_worker.py")


@pytest.fixture(scope="module")
def cached_code(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where transformers puts the code that comes with weights."""
    return tmp_path_factory.mktemp("hf_home")


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., Path]:
    """Saves an untrained byte model and returns its folder."""

    def save(architecture: str = "llama", **fields: Any) -> Path:
        model = tiny_model(architecture, **{"layers": 3, "vocab": 260, "dtype": torch.float32, **fields})
        return save_checkpoint(tmp_path / "model", model, byte_tokenizer())

    return save


@pytest.fixture
def registered() -> None:
    """The class known to transformers in this process."""
    foretoken.register_transformers()


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_alone_drafts_as_the_oracle_does(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path, cached_code: Path
) -> None:
    """In a process that cannot import foretoken, from the code beside the weights; and again from what it saved."""
    trained: Trained = request.getfixturevalue(kind)
    folder = export_hf(trained.checkpoint, tmp_path / "hf")
    for source, drafts in ((folder, (0, *DRAFTS)), (tmp_path / "hf-again", (DRAFTS[-1],))):
        ask = {"prompts": trained.prompts, "tokens": TOKENS, "drafts": drafts}
        ask |= {"again": f"{source}-again", "answer": f"{tmp_path}/answer.json"}
        (tmp_path / "ask.json").write_text(json.dumps(ask))
        done = subprocess.run(
            [sys.executable, WORKER, source, tmp_path / "ask.json"],
            capture_output=True, text=True, cwd=tmp_path, check=False,
            env={**os.environ, "HF_HOME": str(cached_code), "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        answer = json.loads((tmp_path / "answer.json").read_text())
        assert answer["class"] == "ForetokenLlamaForCausalLM"
        assert answer["text"] == trained.tokenizer.decode(trained.prompts[0])
        for count in drafts:
            result = answer["results"][str(count)]
            assert result["ids"] == [output[:TOKENS] for output in trained.outputs]
            wanted = trained.counts_of_all_heads(count)[1]
            assert (result["drafted"], result["accepted"]) == (wanted.drafted, wanted.accepted)
            assert result["accepted"] > 0 or not count


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize(
    ("architecture", "kind", "fields"),
    [
        ("llama", "parallel", {"n_future": 2, "tie_word_embeddings": True}),
        ("mistral", "sequential", {"kv_heads": 1, "unembedding": "per_head"}),
        ("qwen2", "parallel", {"layers": 1}),
        ("qwen2", "sequential", {"tie_word_embeddings": True}),
        ("qwen3", "parallel", {"unembedding": "per_head"}),
        ("qwen3", "sequential", {}),
    ],
)
def test_every_architecture_drafts_what_its_heads_say(
    architecture: str, kind: str, fields: dict[str, Any], saved: Callable[..., Path], tmp_path: Path
) -> None:
    """Without trust_remote_code where foretoken is installed: first drafts are our heads' own choices, ids the same."""
    folder = saved(architecture, head_kind=kind, **fields)
    model, _ = load_checkpoint(folder)
    loaded = load(export_hf(folder, tmp_path / "hf"))
    prompt = [256, *b"for i in range("]
    steps = counted(loaded)
    plain = loaded.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=None)
    candidates: list[list[int]] = []
    noted = loaded._get_candidate_generator

    def noting(**kwargs: Any) -> Any:
        made = noted(**kwargs)
        ask = made.get_candidates

        def get(ids: Any, **rest: Any) -> Any:
            found = ask(ids, **rest)
            candidates.append(found[0][0, ids.shape[1] :].tolist())
            return found

        made.get_candidates = get
        return made

    loaded._get_candidate_generator = noting
    drafted = loaded.generate(
        torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=None, use_mtp=True
    )
    assert drafted.tolist() == plain.tolist()
    most = model.config.n_future - 1
    assert {len(tokens) for tokens in candidates[1:-3]} == {most}
    # Feed the forward of training what was drafted: its states at the prompt's last position are those of the drafts.
    committed = plain[0, : len(prompt) + 1].tolist()
    states = model(torch.tensor([committed + candidates[1]]), length=len(prompt))
    ours = [int(model.logits(state[0, -1], d).argmax()) for d, state in enumerate(states)][1:]
    assert candidates[1] == ours
    assert sum(accepted for _, accepted in steps) + len(steps) == 12


@pytest.mark.usefixtures("registered")
def test_what_was_imported_saved_and_exported_has_the_same_logits(trained: Trained, tmp_path: Path) -> None:
    model, tokenizer = load_checkpoint(trained.checkpoint)
    save_checkpoint(tmp_path / "once more", model, tokenizer)
    loaded = load(export_hf(tmp_path / "once more", tmp_path / "hf"))
    loaded.save_pretrained(tmp_path / "saved")
    again = load(tmp_path / "saved")
    tokens = torch.tensor([trained.prompts[2] + trained.outputs[2][:20]])
    with torch.no_grad():
        ours = model.logits(model(tokens)[0])
        torch.testing.assert_close(loaded(tokens).logits, ours, rtol=1e-5, atol=1e-5)
        assert torch.equal(again(tokens).logits, loaded(tokens).logits)
    wanted = loaded.state_dict()
    assert wanted.keys() == again.state_dict().keys()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in again.state_dict().items())
    assert (tmp_path / "saved" / "modeling_foretoken.py").read_text() == (
        tmp_path / "hf" / "modeling_foretoken.py"
    ).read_text()


@pytest.mark.usefixtures("registered")
def test_sampling_is_transformers_own_law(parallel: Trained, tmp_path: Path) -> None:
    """The joint of three sampled tokens with drafts against exact probabilities, by chi-square."""
    model, _ = load_checkpoint(parallel.checkpoint)
    loaded = load(export_hf(parallel.checkpoint, tmp_path / "hf"))
    prompt = parallel.prompts[1]
    temperature, top_k, draws = 2.0, 3, 800
    steps = counted(loaded)

    def law(ids: list[int]) -> torch.Tensor:
        with torch.no_grad():
            logits = model.logits(model(torch.tensor([ids]))[0][0, -1]) / temperature
        return logits.masked_fill(logits < logits.topk(top_k).values[-1], float("-inf")).softmax(-1)

    expected: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(3):
        laws = {ids: law(prompt + list(ids)) for ids in expected}
        expected = {
            (*ids, token): share * float(laws[ids][token])
            for ids, share in expected.items()
            for token in laws[ids].nonzero()[:, 0].tolist()
        }
    torch.manual_seed(0)
    seen: dict[tuple[int, ...], int] = dict.fromkeys(expected, 0)
    for _ in range(draws):
        out = loaded.generate(
            torch.tensor([prompt]), max_new_tokens=4, do_sample=True, temperature=temperature, top_k=top_k, top_p=1.0,
            eos_token_id=None, use_mtp=True,
        )  # fmt: skip
        seen[tuple(out[0, len(prompt) : len(prompt) + 3].tolist())] += 1
    assert 0 < sum(accepted for _, accepted in steps) < sum(drafted for drafted, _ in steps)
    large = {ids: share * draws for ids, share in expected.items() if share * draws >= 8}
    cells = [(seen[ids], want) for ids, want in large.items()]
    cells.append((draws - sum(n for n, _ in cells), draws - sum(want for _, want in cells)))
    statistic = sum((n - want) ** 2 / want for n, want in cells if want > 1)
    freedom = len(cells) - 1
    z = ((statistic / freedom) ** (1 / 3) - 1 + 2 / (9 * freedom)) / (2 / (9 * freedom)) ** 0.5
    assert freedom >= 8
    assert abs(z) < 4


@pytest.mark.usefixtures("registered")
def test_limits_of_assisted_generation(trained: Trained, tmp_path: Path) -> None:
    loaded = load(export_hf(trained.checkpoint, tmp_path / "hf"))
    ids = torch.tensor([trained.prompts[2]])
    plain = loaded.generate(ids, max_new_tokens=24, do_sample=False, eos_token_id=None)
    end = int(plain[0, ids.shape[1] + 9])
    more = {"max_new_tokens": 24, "do_sample": False, "use_mtp": True}
    stopped = loaded.generate(ids, eos_token_id=end, **more)
    wanted = loaded.generate(ids, max_new_tokens=24, do_sample=False, eos_token_id=end)
    assert stopped.tolist() == wanted.tolist()  # end of text inside an accepted block
    left = torch.cat((torch.full((1, 5), 258), ids), 1)  # padded on the left
    mask = torch.cat((torch.zeros(1, 5, dtype=torch.long), torch.ones_like(ids)), 1)
    steps = counted(loaded)
    padded = loaded.generate(left, attention_mask=mask, eos_token_id=None, **more)
    assert padded[0, 5:].tolist() == plain[0].tolist()
    accepted = sum(a for _, a in steps)
    steps.clear()
    loaded.generate(ids, eos_token_id=None, **more)
    assert sum(a for _, a in steps) == accepted > 0
    with pytest.raises(ValueError, match="batch_size = 1"):
        loaded.generate(ids.repeat(2, 1), eos_token_id=None, **more)
    cache = loaded(ids[:, :-1], use_cache=True).past_key_values
    with pytest.raises(ValueError, match="must read the whole prompt"):
        loaded.generate(ids, past_key_values=cache, eos_token_id=None, **more)
    with pytest.raises(ValueError, match="must read the whole prompt"):
        loaded.generate(inputs_embeds=loaded.get_input_embeddings()(ids), eos_token_id=None, **more)


@pytest.mark.usefixtures("registered")
def test_heads_are_never_made_up(saved: Callable[..., Path], tmp_path: Path) -> None:
    """A missing, an extra and a misshapen tensor are errors when transformers loads."""
    folder = export_hf(saved(), tmp_path / "hf")
    weights = folder / "model.safetensors"
    tensors, name = load_file(weights), "mtp_heads.1.mlp.up_proj.weight"
    for changed, says in (
        ({key: t for key, t in tensors.items() if key != name}, f"'{name}' is missing"),
        (tensors | {"mtp_heads.3.mlp.up_proj.weight": tensors[name].clone()}, "is not one of this model's"),
        (tensors | {name: tensors[name][1:].clone()}, "(?i)mismatch"),
    ):
        save_file(changed, weights, metadata={"format": "pt"})
        with pytest.raises((ValueError, RuntimeError), match=says):
            load(folder)
    save_file(tensors, weights, metadata={"format": "pt"})
    assert load(folder).mtp_heads[2] is not None


def test_what_cannot_be_exported(saved: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved(n_future=1)
    with pytest.raises(CheckpointError, match="has one head"):
        export_hf(folder, tmp_path / "hf")
    assert list(tmp_path.iterdir()) == [folder]
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "foretoken.formats.modeling_foretoken", raising=False)
    with pytest.raises(ConfigError, match=r"pip install 'foretoken\[hf\]'"):
        foretoken.register_transformers()
