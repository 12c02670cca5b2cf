"""Processors change what is picked as their definitions say, at every draft position as in plain decoding."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny_model
from invariants import Violation, follows, require, same_output, slow_probabilities, target_logits
from test_decode import PROMPTS
from test_seeded_bugs import accepts_then_redraws
from tokenizers import Tokenizer as Backend
from tokenizers.models import WordLevel
from torch import Tensor

from foretoken import model as stepping
from foretoken.completion import generate, stream
from foretoken.decode import decode
from foretoken.drafters import Lookup, Source
from foretoken.errors import ConfigError
from foretoken.grammar import Grammar
from foretoken.model import Model, Stepper
from foretoken.processors import Processing, Processors
from foretoken.request import Request
from foretoken.sampling import Keys, Sampling, filtered
from foretoken.sampling import rejection as by_rejection
from foretoken.tokenizer import Tokenizer, byte_tokenizer, train_bpe

KINDS = ["parallel", "sequential"]
END = 3
PROCESSINGS = {
    "repetition": Processing(repetition_penalty=1.8),
    "presence": Processing(presence_penalty=3.0),
    "frequency": Processing(frequency_penalty=1.5),
    "negative": Processing(presence_penalty=-2.0, frequency_penalty=-0.5, repetition_penalty=0.7),
    "bias": Processing(logit_bias={1: 4.0, 5: float("-inf"), 8: -2.5}),
    "min_tokens": Processing(min_tokens=9),
    "all": Processing(1.3, 0.5, 0.25, {2: 1.0}, 5),
}
GREEDY, SOFT, REJECTION = Sampling(), Sampling(1.0, top_k=8), Sampling(1.0, accept="rejection")


def small(kind: str = "parallel", dtype: torch.dtype = torch.float64, **fields: Any) -> Model:
    return tiny_model(**{"head_kind": kind, "dtype": dtype, "peaked": False, "seed": 2, **fields})


def decoded(
    model: Model,
    processing: Processing | Sequence[Processing | None],
    drafts: int,
    sampling: Sampling,
    prompts: Sequence[Sequence[int]] = PROMPTS,
    source: Source = None,
    slots: int | None = None,
    seeds: Sequence[int] | None = None,
    length: int = 20,
    nodes: int | None = None,
) -> list[Request]:
    requests = []
    for index, prompt in enumerate(prompts):
        own = processing if isinstance(processing, Processing) else processing[index]
        request = Request(list(prompt), length, seeds[index] if seeds else index, frozenset([END]))
        request.processors = None if own is None else Processors(own, prompt, [END])
        requests.append(request)
    for _ in decode(model, requests, sampling, drafts, slots, source, nodes):
        pass
    return requests


def slowly(logits: Sequence[float], processing: Processing, prompt: Sequence[int], ids: Sequence[int]) -> list[float]:
    """The definition, token by token."""
    changed = []
    for token, x in enumerate(logits):
        if token in ids or token in prompt:
            x = x / processing.repetition_penalty if x > 0 else x * processing.repetition_penalty
        x -= processing.frequency_penalty * ids.count(token) + (processing.presence_penalty if token in ids else 0)
        x += processing.logit_bias.get(token, 0.0)
        if token == END and len(ids) < processing.min_tokens:
            x = float("-inf")
        changed.append(x)
    return changed


def picks_follow_the_definition(model: Model, request: Request, processing: Processing) -> None:
    """Greedy: every token is the best of the changed logits that a full forward gives at its place."""
    logits = target_logits(model, request).tolist()
    for k, token in enumerate(request.ids):
        wanted = slowly(logits[k], processing, request.prompt, request.ids[:k])
        require(wanted[token] >= max(wanted) - 1e-9, f"token {k} is not the best one")


@pytest.mark.parametrize("name", PROCESSINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_picks_follow_the_definition(kind: str, name: str) -> None:
    model, changed = small(kind), False
    for drafts in (0, 3):
        for request in decoded(model, PROCESSINGS[name], drafts, GREEDY):
            picks_follow_the_definition(model, request, PROCESSINGS[name])
            if name != "min_tokens":
                try:
                    picks_follow_the_definition(model, request, Processing())
                except Violation:
                    changed = True
    assert changed or name == "min_tokens"


@pytest.mark.parametrize("sampling", [GREEDY, SOFT], ids=["greedy", "soft"])
@pytest.mark.parametrize("name", PROCESSINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_speculative_is_plain(kind: str, name: str, sampling: Sampling) -> None:
    for dtype, gap in ((torch.float64, 1e-9), (torch.float32, 1e-4)):
        model = small(kind, dtype)
        plain, accepted = decoded(model, PROCESSINGS[name], 0, sampling), 0
        assert all(request.finish_reason for request in plain)
        ways: list[tuple[int, Source, int | None, int | None]] = [(k, None, None, None) for k in (1, 2, 3)]
        ways += [(3, None, 2, None), (3, Lookup(2), None, None), (2, small(seed=5), 2, None)]
        ways += [(2, None, None, 6), (3, None, 2, 9), (2, small(seed=5), 2, 6)]  # trees
        for drafts, source, slots, nodes in ways:
            source = source.to(dtype) if isinstance(source, Model) else source
            found = decoded(model, PROCESSINGS[name], drafts, sampling, source=source, slots=slots, nodes=nodes)
            for a, b in zip(found, plain, strict=True):
                same_output(a, b, gap)
                accepted += sum(step.accepted for step in a.steps)
        assert accepted > 0


def test_each_request_has_its_own() -> None:
    model = small()
    mixed = [None, PROCESSINGS["all"], PROCESSINGS["bias"], None, PROCESSINGS["repetition"]][: len(PROMPTS)]
    for sampling in (GREEDY, SOFT):
        for index, request in enumerate(decoded(model, mixed, 3, sampling, slots=2)):
            (alone,) = decoded(model, [mixed[index]], 3, sampling, [PROMPTS[index]], seeds=[index])
            same_output(request, alone)


def test_a_penalty_blind_to_drafts_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    model, real = small(), Processors.apply
    plain = decoded(model, PROCESSINGS["frequency"], 0, SOFT, [[3, 1, 4]] * 60)
    found = decoded(model, PROCESSINGS["frequency"], 3, SOFT, [[3, 1, 4]] * 60)
    monkeypatch.setattr(Processors, "apply", lambda own, logits, ids, further: real(own, logits, ids, ()))
    blind = decoded(model, PROCESSINGS["frequency"], 3, SOFT, [[3, 1, 4]] * 60)
    assert [r.ids for r in found] == [r.ids for r in plain]
    assert [r.ids for r in blind] != [r.ids for r in plain]


def law(model: Model, processing: Processing, prompt: Sequence[int], length: int, sampling: Sampling) -> np.ndarray:
    """Of all continuations, by enumeration through full forwards."""
    V = model.config.vocab_size
    joint = []
    with torch.no_grad():
        for sequence in torch.cartesian_prod(*[torch.arange(V)] * length).view(-1, length).tolist():
            p = 1.0
            logits = model.logits(model(torch.tensor([[*prompt, *sequence[:-1]]]))[0])[0, len(prompt) - 1 :].tolist()
            for k, token in enumerate(sequence):
                p *= slow_probabilities(slowly(logits[k], processing, prompt, sequence[:k]), sampling)[token]
            joint.append(p)
    return np.array(joint)


def blind(patch: pytest.MonkeyPatch) -> None:
    """Processors forget the drafts."""
    real = Processors.apply
    patch.setattr(Processors, "apply", lambda own, logits, ids, further: real(own, logits, ids, ()))


def bonus_of_the_position_before(patch: pytest.MonkeyPatch) -> None:
    """The token behind the drafts is picked where the last of them was."""
    real = Stepper.forward

    def forward(own: Stepper, tokens: Tensor, *rest: Any, **how: Any) -> tuple[Tensor, Tensor]:
        hidden, z = real(own, tokens, *rest, **how)
        if tokens.size(1) == 3:  # a step: the prompt has two tokens
            hidden[0, :, 2] = hidden[0, :, 1]
        return hidden, z

    patch.setattr(Stepper, "forward", torch.inference_mode()(forward))


def redrawn_from_the_whole_law(patch: pytest.MonkeyPatch) -> None:
    """Behind a rejected draft the target's law is drawn from, not what is left of it."""

    def rejection(logits: Tensor, drafts: Tensor, proposed: Tensor, keys: Keys) -> tuple[Tensor, Tensor]:
        tokens, accepted = by_rejection(logits, drafts, proposed, keys)
        fresh = keys.choose(logits)
        return tokens.scatter(1, accepted[:, None], fresh.gather(1, accepted[:, None])), accepted

    patch.setattr(stepping, "rejection", rejection)


def drafted_otherwise(change: Callable[[Tensor], Tensor]) -> Callable[[pytest.MonkeyPatch], None]:
    """Drafts come from changed logits, and are accepted as if from the others."""
    real = Keys.choose_drafts

    def bug(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(Keys, "choose_drafts", lambda own, logits, *rest: real(own, change(logits), *rest))

    return bug


def of_two(logits: Tensor) -> Tensor:
    """The two likeliest tokens' logits."""
    return filtered(logits, Sampling(1.0, top_k=2))


def of_one(logits: Tensor) -> Tensor:
    """The likeliest token's logits."""
    return filtered(logits, Sampling(1.0, top_k=1))


Bug = Callable[[pytest.MonkeyPatch], None]
LAWS: list[tuple[str, str, str, Bug | None]] = [
    *((kind, accept, "none", None) for kind in KINDS for accept in ("keyed", "rejection")),
    ("parallel", "keyed", "blind", blind),
    ("sequential", "keyed", "bonus", bonus_of_the_position_before),
    ("parallel", "keyed", "redrawn", accepts_then_redraws),
    ("sequential", "rejection", "blind", blind),
    ("parallel", "rejection", "bonus", bonus_of_the_position_before),
    ("sequential", "rejection", "redrawn", redrawn_from_the_whole_law),
    ("parallel", "rejection", "drafts of two", drafted_otherwise(of_two)),
    ("sequential", "rejection", "drafts of one", drafted_otherwise(of_one)),
]


@pytest.mark.parametrize(("kind", "accept", "name", "bug"), LAWS, ids=["-".join(row[:3]) for row in LAWS])
def test_law(kind: str, accept: Any, name: str, bug: Bug | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The joint law of the first token, two drafts and the one behind them, with processors; it sees bugs."""
    model, how = small(kind, width=8, vocab=5, seed=3), Sampling(1.0, accept=accept)
    with torch.no_grad():
        model.lm_head.weight.mul_(25)
        for name, p in model.named_parameters():
            if p.dim() == 2 and name != "lm_head.weight":
                p.mul_(12)
    processing = Processing(1.5, 0.5, 1.0, {1: 0.7}, 3)
    probabilities = law(model, processing, [1, 2], 4, how)
    if bug:
        bug(monkeypatch)
    requests = decoded(model, processing, 2, how, [[1, 2]] * 3000, seeds=range(3000), length=4)
    cells = [sum(token * 5 ** (3 - k) for k, token in enumerate(request.ids)) for request in requests]
    if bug:
        with pytest.raises(Violation):
            follows(np.bincount(cells, minlength=625), probabilities)
    else:
        follows(np.bincount(cells, minlength=625), probabilities)


# Grammars

BYTES = byte_tokenizer()
TEXT = tiny_model(vocab=260, peaked=False, dtype=torch.float32, layers=2, n_future=4, seed=4)
SEQUENTIAL = tiny_model(vocab=260, peaked=False, dtype=torch.float32, layers=3, head_kind="sequential", seed=4)
SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["ant", "bee", "élan"]}, "legs": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "legs"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("model", [TEXT, SEQUENTIAL], ids=KINDS)
def test_json_follows_its_schema(model: Model, temperature: float) -> None:
    prompts = ["x = ", "", "an insect: "]
    options: dict[str, Any] = {"json_schema": SCHEMA, "temperature": temperature, "max_tokens": 100}
    plain, accepted = generate(model, BYTES, prompts, drafts=0, **options), 0
    for generation in plain:
        value = json.loads(generation.text)
        assert set(value) == {"name", "legs"}
        assert value["name"] in ("ant", "bee", "élan")
        assert 0 <= value["legs"] <= 99
        assert generation.finish_reason == "stop"
    for ways in (
        {"drafts": 1},
        {"drafts": 3},
        {"drafts": 3, "lookup": 2},
        {"drafts": 3, "draft_vocab": 100},
        {"drafts": 2, "draft_model": SEQUENTIAL},
        {},
    ):
        for a, b in zip(generate(model, BYTES, prompts, **options, **ways), plain, strict=True):
            assert a.ids == b.ids
            assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)
            accepted += sum(step.accepted for step in a.steps)
    assert accepted > 0


GRAMMARS: dict[str, tuple[dict[str, str], Callable[[str], object]]] = {
    "regex": ({"regex": r"[ab]{3}-[0-9]+;"}, lambda text: re.fullmatch(r"[ab]{3}-[0-9]+;", text)),
    "lark": ({"lark": 'start: item ("," item)*  "."\nitem: /[a-c]/ | "(" item ")"'}, lambda text: text.endswith(".")),
    "schema": ({"json_schema": json.dumps(SCHEMA)}, json.loads),
}


def test_a_row_with_processors_joins_plain_decoding_under_rejection() -> None:
    model, mixed = small(dtype=torch.float32), [None, None, PROCESSINGS["presence"]]
    found = decoded(model, mixed, 0, REJECTION, PROMPTS[:3], slots=2)
    for a, b in zip(found, decoded(model, mixed, 0, Sampling(1.0), PROMPTS[:3], slots=2), strict=True):
        same_output(a, b, 1e-4)


@pytest.mark.parametrize("name", GRAMMARS)
def test_grammars(name: str) -> None:
    tokenizer = train_bpe(["ab-12; aab-3; (a),(b),c. ant bee legs name élan 0 1 2 3 4 5 6 7 8 9"] * 9, 300)
    model = tiny_model(vocab=tokenizer.vocab_size + 3, peaked=False, dtype=torch.float32, layers=2, seed=4)
    options, right = GRAMMARS[name]
    for seed in range(3):
        plain = generate(model, tokenizer, "a", temperature=1.0, seed=seed, max_tokens=150, drafts=0, **options)  # type: ignore[arg-type]
        fast = generate(model, tokenizer, "a", temperature=1.0, seed=seed, max_tokens=150, drafts=3, **options)  # type: ignore[arg-type]
        assert fast.ids == plain.ids
        assert plain.finish_reason == "length" or right(plain.text)
        assert max(plain.ids) < tokenizer.vocab_size


@pytest.mark.parametrize(
    ("lark", "right"),
    [
        ('start: a b\na[stop="c"]: /[a-c]*/\nb: "!" /[xy]{3}/', "[ab]*c![xy]{3}"),
        ('start: a b\na[max_tokens=3]: /[a-c]*/\nb: "!" /[xy]{3}/', "[a-c]{0,3}![xy]{3}"),
    ],
    ids=["stop", "max_tokens"],
)
def test_grammars_that_cannot_be_rolled_back(lark: str, right: str) -> None:
    for seed in range(3):
        options: dict[str, Any] = {"lark": lark, "seed": seed, "temperature": 1.0, "max_tokens": 40}
        plain = generate(TEXT, BYTES, "x", drafts=0, **options)
        assert re.fullmatch(right, plain.text)
        assert generate(TEXT, BYTES, "x", drafts=3, **options).ids == plain.ids


def test_a_grammar_beyond_the_librarys_limits() -> None:
    """Behind four tokens 2,100 rules are open; a draft that leads there says nothing of the text."""
    rules = "".join(f'\nr{i}: c "{i}"' for i in range(2100))
    lark = f'start: c c c c (t | "!")\nc: "a" | "b"\nt: {" | ".join(f"r{i}" for i in range(2100))}{rules}'
    for drafts in (0, 3):
        with pytest.raises(ConfigError, match=r"^lark: Parser Error: Current row has \d+ items; max is 2000; .*$"):
            generate(TEXT, BYTES, "x", lark=lark, drafts=drafts)
    matcher = Grammar(BYTES, "lark", lark).matcher()
    assert matcher.mask([97, 97], [97, 97]) is None
    assert matcher.mask([97, 97], [97]) is not None


@pytest.mark.parametrize("drafts", [0, 3])
def test_a_grammar_goes_before_bans(drafts: int) -> None:
    options: dict[str, Any] = {"regex": "ab[cd]|abef", "drafts": drafts, "temperature": 1.0}
    found = {
        generate(TEXT, BYTES, "x", seed=s, logit_bias={98: -math.inf, 99: -math.inf}, **options).text for s in range(9)
    }
    assert found == {"abd", "abef"}


def test_an_empty_schema_is_any_json() -> None:
    text = generate(TEXT, BYTES, "x", json_schema={}, temperature=1.0, seed=1, max_tokens=3).text
    assert text[0] in '{["-0123456789tfn'


def test_rejection_follows_a_grammar_too() -> None:
    for seed in range(20):
        text = generate(
            TEXT, BYTES, "q", regex="[abc]{4}|xyz", temperature=1.0, seed=seed, drafts=3, accept="rejection"
        ).text
        assert re.fullmatch("[abc]{4}|xyz", text)


def test_a_grammar_that_forgets_its_drafts_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    from foretoken.grammar import GrammarMatcher

    real = GrammarMatcher.mask
    monkeypatch.setattr(GrammarMatcher, "mask", lambda own, ids, further: real(own, ids, ()))
    with pytest.raises(ConfigError, match=r"json_schema: Parser Error: token .* doesn't satisfy the grammar"):
        generate(TEXT, BYTES, "x", json_schema=SCHEMA, drafts=3)


def test_min_tokens_holds_off_every_end() -> None:
    for drafts in (0, 3):
        options: dict[str, Any] = {
            "temperature": 1.0,
            "max_tokens": 60,
            "drafts": drafts,
            "logit_bias": {257: 12.0, 97: 12.0},
        }
        assert len(generate(TEXT, BYTES, "x", **options).ids) < 12
        found = generate(TEXT, BYTES, "x", min_tokens=12, stop="a", **options)
        assert len(found.ids) >= 12
        assert 257 not in found.ids[:11]


@pytest.mark.parametrize("drafts", [0, 3])
def test_a_stop_string_among_the_first_tokens_is_none(drafts: int) -> None:
    options: dict[str, Any] = {"drafts": drafts, "temperature": 1.0, "logit_bias": {98: 100.0}}
    found = generate(TEXT, BYTES, "x", regex="a[b]*", stop="a", min_tokens=6, max_tokens=9, **options)
    assert (found.text, found.finish_reason) == ("abbbbbbbb", "length")
    found = generate(TEXT, BYTES, "x", regex="a[b]*", stop="bb", min_tokens=6, max_tokens=9, **options)
    assert (found.text, found.finish_reason) == ("abbb", "stop")  # the one that ends with the sixth


@pytest.mark.parametrize("drafts", [0, 3])
def test_pieces_are_the_text_where_it_ends_before_it_may_stop(drafts: int) -> None:
    options: dict[str, Any] = {"drafts": drafts, "min_tokens": 50, "max_tokens": 20, "stop": "zzz"}
    found = generate(TEXT, BYTES, "x", **options)
    assert "".join(piece for piece, *_ in stream(TEXT, BYTES, "x", **options)) == found.text != ""


def test_a_grammar_goes_on_where_the_end_of_text_ends_nothing() -> None:
    options: dict[str, Any] = {
        "regex": "a*", "ignore_eos": True, "temperature": 1.0, "logit_bias": {257: 6.0, 97: 5.0}, "max_tokens": 30,
    }  # fmt: skip
    for seed in range(4):
        plain, drafted = (generate(TEXT, BYTES, "x", seed=seed, drafts=drafts, **options) for drafts in (0, 3))
        assert drafted.ids == plain.ids
        assert {*plain.ids} == {97, 257}


@pytest.mark.parametrize("drafts", [0, 3])
def test_every_end_ends_a_grammar(drafts: int) -> None:
    """Eos, the end of a turn, and what else the model lists."""
    template = "{% for m in messages %}{{ m.content }}<|unused|>{% endfor %}"
    tokenizer = dataclasses.replace(BYTES, chat_template=template, further_ends=(258,))
    for end in (257, 258, 259):
        options: dict[str, Any] = {"temperature": 1.0, "logit_bias": {end: 30.0, 97: 30.0}, "drafts": drafts}
        found = generate(TEXT, tokenizer, "x", regex="a+", **options)
        assert (found.ids[-1], {*found.text}, found.finish_reason) == (end, {"a"}, "stop")


MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"max_token": 3}, "unknown option max_token: there are accept, batch_size"),
    ({"draft_model": "some/path", "drafts": 5}, "drafts come from a Model or a Lookup, and not from 'some/path'"),
    ({"repetition_penalty": 0.0}, "repetition_penalty = 0.0 must be a positive number"),
    ({"presence_penalty": float("nan")}, "presence_penalty = nan must be a number"),
    ({"min_tokens": -1}, "min_tokens = -1 must be at least 0"),
    ({"logit_bias": {260: 1.0}}, "token 260 is not among the model's 260"),
    ({"logit_bias": {1: float("inf")}}, "logit_bias of token 1 = inf"),
    ({"regex": "[a"}, "regex: "),
    ({"lark": "start: nothing"}, "lark: "),
    ({"json_schema": "{"}, "json_schema: "),
    ({"json_schema": ""}, "json_schema: "),
    ({"json_schema": "true"}, "json_schema: a schema is an object, as {} is for any JSON, and not 'true'"),
    ({"lark": ""}, "lark: "),
    ({"json_schema": {"type": "no such type"}}, "json_schema: "),
    ({"regex": "a", "lark": 'start: "a"'}, "only one of them"),
]


@pytest.mark.parametrize(("options", "part"), MISTAKES, ids=[part[:20] for _, part in MISTAKES])
def test_mistakes(options: dict[str, Any], part: str) -> None:
    with pytest.raises(ConfigError) as error:
        generate(TEXT, BYTES, "x", **options)
    assert part in str(error.value)


def test_grammars_need_a_vocabulary_that_the_library_reads_and_an_end() -> None:
    """Without an end-of-text token the library would take token 0 for one."""
    words = Backend(WordLevel({"a": 0, "<eos>": 1}, unk_token="a"))
    for tokenizer, part in (
        (dataclasses.replace(BYTES, eos_id=None), "has an end-of-text token"),
        (Tokenizer(words, None, 1, None), "decoder"),
    ):
        with pytest.raises(ConfigError, match=rf"regex: .*{part}"):
            Grammar(tokenizer, "regex", "a")


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError) as error:
        Grammar(BYTES, "regex", "a")
    assert str(error.value) == "regex: a grammar needs pip install 'foretoken[grammar]'"
