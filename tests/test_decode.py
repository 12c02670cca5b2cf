"""Drafts change the speed and nothing else: tokens, laws, log-probabilities, counts, stops, streams, errors."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from conftest import Oracle, run, tiny_model
from invariants import (
    counts_add_up,
    drafts_are_the_heads,
    greedy_is_argmax,
    logprobs_are_targets,
    same_output,
    sampling_law,
    slow_probabilities,
    speculative_is_plain,
    target_logits,
)
from tokenizer_twins import LLAMA_2_FIRST, llama_2

from foretoken.completion import Generation, TextRequest, generate, stream
from foretoken.decode import decode
from foretoken.errors import ConfigError
from foretoken.model import Model
from foretoken.processors import Processing, Processors
from foretoken.request import Request
from foretoken.sampling import Sampling
from foretoken.tokenizer import byte_tokenizer

PROMPTS = [[3, 1, 4], [1, 5, 9, 2, 6, 5, 3, 5], [8], [9, 7, 9, 3, 2]]
SAMPLINGS = [
    Sampling(),
    Sampling(0.7),
    Sampling(1.0, top_k=4),
    Sampling(1.2, top_p=0.8),
    Sampling(1.5, min_p=0.1),
    Sampling(0.9, top_k=8, top_p=0.9, min_p=0.02),
]
NAMES = ["greedy", "plain", "top-k", "top-p", "min-p", "all"]
CONFIDENT = tiny_model()
VAGUE = tiny_model(peaked=False, seed=1)  # with the target's noise its drafts are often right
BYTES = byte_tokenizer()


def text_model() -> Model:
    """Four heads over bytes whose greedy text is ASCII: other bytes have an ASCII twin of higher logit."""
    model = tiny_model(vocab=260, seed=2)
    with torch.no_grad():
        model.lm_head.weight[128:256] = 0.5 * model.lm_head.weight[:128]
        model.lm_head.weight[256:] = 0.5 * model.lm_head.weight[:4]
    return model


TEXT = text_model()


# Speculative is plain


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=NAMES)
@pytest.mark.parametrize("drafts", [1, 2, 3])
def test_speculative_equals_plain(drafts: int, sampling: Sampling) -> None:
    accepted = 0
    for model in (CONFIDENT, VAGUE):
        for prompts in ([PROMPTS[1]], PROMPTS):
            for request in speculative_is_plain(model, prompts, drafts, sampling, (24, 1, 17)):
                logprobs_are_targets(model, request)
                drafts_are_the_heads(model, request, sampling)
                if sampling.temperature == 0:
                    greedy_is_argmax(model, request)
                accepted += sum(step.accepted for step in request.steps)
    assert accepted > 10  # drafts were verified, not only refused


@pytest.mark.parametrize("sampling", [SAMPLINGS[0], SAMPLINGS[1], SAMPLINGS[5]], ids=["greedy", "plain", "all"])
@pytest.mark.parametrize("kind", ["parallel", "sequential"])
def test_drafts_among_the_first_tokens_change_nothing(kind: str, sampling: Sampling) -> None:
    accepted = {}
    for draft_vocab in (1, 6, 16, 17):
        requests = []
        for model in (tiny_model(head_kind=kind), tiny_model(head_kind=kind, peaked=False, seed=1)):
            for request in speculative_is_plain(model, PROMPTS, 3, sampling, (24, 1, 17), draft_vocab=draft_vocab):
                logprobs_are_targets(model, request)
                drafts_are_the_heads(model, request, sampling, draft_vocab)
                requests.append(request)
        drafted = {token for request in requests for step in request.steps for token in step.drafted}
        assert drafted <= set(range(draft_vocab))
        accepted[draft_vocab] = sum(step.accepted for request in requests for step in request.steps)
    assert 0 < accepted[1] < accepted[17] or sampling.temperature == 0


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3"])
def test_speculative_equals_plain_in_other_architectures(architecture: str) -> None:
    model = tiny_model(architecture, n_future=3, kv_heads=1, seed=4)
    for sampling in (SAMPLINGS[0], SAMPLINGS[5]):
        for request in speculative_is_plain(model, PROMPTS, 2, sampling):
            logprobs_are_targets(model, request)


@pytest.mark.parametrize("sampling", [SAMPLINGS[0], SAMPLINGS[3]], ids=["greedy", "top-p"])
def test_speculative_equals_plain_in_float32(sampling: Sampling) -> None:
    for seed in (0, 5):
        model = tiny_model(dtype=torch.float32, seed=seed)
        for request in speculative_is_plain(model, PROMPTS, 3, sampling, (16,), tolerance=1e-3):
            logprobs_are_targets(model, request, 1e-3)
            if sampling.temperature == 0:
                greedy_is_argmax(model, request, 1e-3)


def test_one_head_decodes() -> None:
    model = tiny_model(n_future=1)
    for request in speculative_is_plain(model, PROMPTS, 0):
        greedy_is_argmax(model, request)
    # Unused heads change nothing: the same trunk, head 1 and seed, with three heads beside it.
    more = tiny_model(n_future=4)
    state = model.state_dict()
    more.load_state_dict({name: state.get(name, tensor) for name, tensor in more.state_dict().items()})
    for a, b in zip(run(model, PROMPTS, 0), run(more, PROMPTS, 3), strict=True):
        same_output(a, b)


@pytest.mark.parametrize("sampling", [SAMPLINGS[0], SAMPLINGS[5]], ids=["greedy", "all"])
@pytest.mark.parametrize("drafts", [1, 2, 3])
def test_drafts_right_up_to_j(oracle_drafter: Oracle, drafts: int, sampling: Sampling) -> None:
    """Random heads are seldom right, so every acceptance, the whole block above all, is forced."""
    length = 20
    plain = {tuple(r.prompt): r for r in run(CONFIDENT, PROMPTS, 0, sampling, length)}
    for right in range(drafts + 1):
        oracle_drafter({prompt: r.ids for prompt, r in plain.items()}, right, 17)
        for request in run(CONFIDENT, PROMPTS, drafts, sampling, length):
            same_output(request, plain[tuple(request.prompt)])
            counts_add_up(request, drafts)
            logprobs_are_targets(CONFIDENT, request)
            assert [step.accepted for step in request.steps[:-1]] == [right] * (len(request.steps) - 1)
            assert len(request.steps) == -(-(length - 1) // (right + 1))


@pytest.mark.parametrize("right", [0, 1, 2, 3])
def test_end_of_text_inside_a_block(oracle_drafter: Oracle, right: int) -> None:
    sampling = Sampling(1.0)
    plain = run(CONFIDENT, PROMPTS, 0, sampling)
    oracle_drafter({tuple(r.prompt): r.ids for r in plain}, right, 17)
    reached = set()
    for end in range(17):
        for whole, cut in zip(plain, run(CONFIDENT, PROMPTS, 3, sampling, end_ids=[end]), strict=True):
            wanted = whole.ids[: whole.ids.index(end) + 1] if end in whole.ids else whole.ids
            assert cut.ids == wanted
            assert cut.finish_reason == ("stop" if end in whole.ids else "length")
            assert cut.logprobs == pytest.approx(whole.logprobs[: len(wanted)], abs=1e-9)
            counts_add_up(cut, 3)
            if cut.steps and cut.finish_reason == "stop":
                reached.add(cut.steps[-1].committed)
    assert reached == set(range(1, right + 2))  # at every place of a block


@pytest.mark.parametrize("right", [0, 1, 3])
def test_max_tokens_inside_a_block(oracle_drafter: Oracle, right: int) -> None:
    plain = run(CONFIDENT, PROMPTS, 0, max_tokens=14)
    oracle_drafter({tuple(r.prompt): r.ids for r in plain}, right, 17)
    for limit in range(1, 14):
        for whole, cut in zip(plain, run(CONFIDENT, PROMPTS, 3, max_tokens=limit), strict=True):
            assert (cut.ids, cut.finish_reason) == (whole.ids[:limit], "length")
            counts_add_up(cut, 3)
    (nothing, some) = run(CONFIDENT, PROMPTS[:2], 3, max_tokens=[0, 5])
    assert (nothing.ids, nothing.finish_reason, some.ids) == ([], None, plain[1].ids[:5])


# A request and its batch


def test_output_does_not_depend_on_the_batch() -> None:
    sampling, seeds = Sampling(1.1, top_p=0.95), [7, 8, 9, 10]
    limits = [5, 24, 11, 18]  # rows leave the batch at different times
    together = run(VAGUE, PROMPTS, 3, sampling, limits, seeds)
    backwards = run(VAGUE, PROMPTS[::-1], 2, sampling, limits[::-1], seeds[::-1])[::-1]
    for i, request in enumerate(together):
        alone = run(VAGUE, [PROMPTS[i]], 1, sampling, limits[i], [seeds[i]])[0]
        same_output(request, alone)
        same_output(backwards[i], alone)


def test_equal_prompts_differ_by_seed_alone() -> None:
    requests = run(VAGUE, [PROMPTS[0]] * 6, 3, Sampling(1.0), seeds=[1, 2, 3, 4, 1, 2])
    outputs = [tuple(r.ids) for r in requests]
    assert len(set(outputs[:4])) == 4
    assert outputs[4:] == outputs[:2]
    greedy = run(VAGUE, [PROMPTS[0]] * 3, 3)
    assert len({tuple(r.ids) for r in greedy}) == 1


def test_a_caller_may_end_a_request() -> None:
    plain = run(VAGUE, PROMPTS, 0, Sampling(1.0))
    requests = [Request(list(prompt), 24, seed) for seed, prompt in enumerate(PROMPTS)]
    for request, _ in decode(VAGUE, requests, Sampling(1.0), 3):
        if request is requests[1] and len(request.ids) >= 6:
            request.finish_reason = "cancelled"
    for i, (request, whole) in enumerate(zip(requests, plain, strict=True)):
        assert request.ids == whole.ids[: len(request.ids)]
        assert (6 <= len(request.ids) < 10) if i == 1 else request.ids == whole.ids


def test_what_is_yielded_is_what_is_committed() -> None:
    requests = [Request(list(prompt), 12, seed) for seed, prompt in enumerate(PROMPTS)]
    seen: dict[int, list[int]] = {id(r): [] for r in requests}
    for request, new in decode(VAGUE, requests, Sampling(1.0), 3):
        assert new
        seen[id(request)] += new
        assert seen[id(request)] == request.ids
    assert all(len(r.ids) == 12 for r in requests)


# Laws

LAW_SAMPLINGS = [
    (3, Sampling(1.0), 10_000),
    (2, Sampling(2.0, top_k=4), 4_000),
    (1, Sampling(0.7, top_p=0.9), 4_000),
    (3, Sampling(1.0, min_p=0.4), 4_000),
]


def law_model() -> Model:
    """Five tokens; heads unlike each other, and far from uniform, so that a draft taken on trust shows."""
    model = tiny_model(n_future=4, layers=2, width=8, vocab=5, peaked=False, seed=3)
    with torch.no_grad():
        model.lm_head.weight.mul_(25)
        for name, p in model.named_parameters():
            if p.dim() == 2 and name != "lm_head.weight":
                p.mul_(12)
    return model


LAW = law_model()


@pytest.mark.parametrize(
    ("drafts", "sampling", "samples"), LAW_SAMPLINGS, ids=["K3", "K2-top-k", "K1-top-p", "K3-min-p"]
)
def test_joint_law_is_the_plain_models(drafts: int, sampling: Sampling, samples: int) -> None:
    requests = sampling_law(LAW, [1, 2, 3], drafts, sampling, samples)
    accepted = [step.accepted for request in requests for step in request.steps]
    assert {0, drafts} <= set(accepted)  # refused at once, and accepted whole
    assert {len(request.steps) for request in requests} >= {2, 3} or drafts == 1


def test_temperature_towards_zero_is_greedy() -> None:
    for a, b in zip(run(CONFIDENT, PROMPTS, 3, Sampling(1e-9)), run(CONFIDENT, PROMPTS, 3), strict=True):
        same_output(a, b)


def test_emitted_tokens_are_possible_under_the_filters() -> None:
    sampling = Sampling(1.3, top_k=3, min_p=0.05)
    for request in run(VAGUE, PROMPTS, 3, sampling):
        for logits, token in zip(target_logits(VAGUE, request).tolist(), request.ids, strict=True):
            assert slow_probabilities(logits, sampling)[token] > 0


# Text


def test_generation_reports_what_its_steps_did(oracle_drafter: Oracle) -> None:
    plain = generate(TEXT, BYTES, "def f(", max_tokens=22, drafts=0)
    assert plain.text == BYTES.decode(plain.ids)
    assert (plain.tokens_per_step, plain.sources) == (1.0, [1] * 22)
    assert len(plain.steps) == 21
    oracle_drafter({tuple(BYTES.encode("def f(", True)): plain.ids}, 2, 260)
    drafted = generate(TEXT, BYTES, "def f(", max_tokens=22, drafts=3)
    assert (drafted.text, drafted.ids) == (plain.text, plain.ids)
    # One from the prefill, then three to a step: drafts of heads 2 and 3, and the target's own.
    assert drafted.sources == [1, *[2, 3, 1] * 7]
    assert drafted.tokens_per_step == 3.0
    cut = generate(TEXT, BYTES, "def f(", max_tokens=21, drafts=3)
    assert cut.sources == [1, *[2, 3, 1] * 6, 2, 3]
    assert cut.tokens_per_step == 20 / 7
    assert [(s.accepted, s.committed) for s in cut.steps[-2:]] == [(2, 3), (2, 2)]


def test_a_list_of_prompts_is_one_request_each() -> None:
    prompts = ["a", "bc", "", "def", "x y z"]
    options = {"max_tokens": 9, "temperature": 1.0, "seed": 40}
    together = generate(TEXT, BYTES, prompts, batch_size=2, **options)
    assert [g.prompt for g in together] == prompts
    for i, generation in enumerate(together):
        alone = generate(TEXT, BYTES, prompts[i], **{**options, "seed": 40 + i}, drafts=0)
        assert (generation.ids, generation.text, generation.seed) == (alone.ids, alone.text, 40 + i)
        assert generation.logprobs == pytest.approx(alone.logprobs, abs=1e-9)


@pytest.fixture
def oracle_text(oracle_drafter: Oracle) -> tuple[str, Generation]:
    """A prompt, what plain decoding makes of it, and drafts that are all right."""
    prompt = "hello"
    plain = generate(TEXT, BYTES, prompt, max_tokens=30, drafts=0)
    oracle_drafter({tuple(BYTES.encode(prompt, True)): plain.ids}, 3, 260)
    return prompt, plain


def absent(text: str) -> str:
    return next(c for c in map(chr, range(128)) if c not in text)


def first_end(text: str, stops: Sequence[str]) -> int:
    """Characters that have come when the first stop string is complete."""
    return min(end for end in range(1, len(text) + 1) if any(stop in text[:end] for stop in stops))


def test_stop_strings_cut_as_if_token_by_token(oracle_text: tuple[str, Generation]) -> None:
    prompt, plain = oracle_text
    assert len(plain.text) == len(plain.ids) == 30
    assert plain.text.isascii()
    places = set()
    for start in range(28):
        for stop in (plain.text[start], plain.text[start : start + 3]):
            found = generate(TEXT, BYTES, prompt, max_tokens=30, stop=stop, drafts=3)
            end = first_end(plain.text, [stop])
            assert (found.text, found.finish_reason) == (plain.text[: end - len(stop)], "stop")
            assert found.ids == plain.ids[:end]
            assert len(found.logprobs) == len(found.ids) == len(found.sources)
            places.add(found.steps[-1].committed if found.steps else 0)
    assert places == {0, 1, 2, 3, 4}  # in the prefill's token, and at every place of a block


def test_the_first_of_several_stops_ends(oracle_text: tuple[str, Generation]) -> None:
    prompt, plain = oracle_text
    stops = (plain.text[20:22], "never to be seen", plain.text[10:12], plain.text[9:12])  # two end together
    found = generate(TEXT, BYTES, prompt, max_tokens=30, stop=stops, drafts=3)
    end = first_end(plain.text, stops)
    assert found.ids == plain.ids[:end]
    assert found.text == plain.text[: min(plain.text.find(s) for s in stops if s in plain.text[:end])]
    assert (found.ids, found.text) == (plain.ids[:12], plain.text[:9])
    same = generate(TEXT, BYTES, prompt, max_tokens=30, stop="never to be seen", drafts=3)
    assert (same.text, same.finish_reason) == (plain.text, "length")


@pytest.mark.parametrize(
    ("stop", "least", "text", "count"),
    [
        ("\n", 0, "a", 2),
        ("\n\n", 0, "a", 3),
        ("\né", 0, "a\n\n", 6),
        ("\n", 3, "a\n", 3),
        ("\ufffd", 0, "a\n\n\néa", 7),
    ],
)
def test_stop_strings_of_byte_tokens(stop: str, least: int, text: str, count: int) -> None:
    """A decoder holds a run of byte tokens back, whose end may spoil it; what stands there already is searched."""
    tokenizer = llama_2([*LLAMA_2_FIRST, "a"], [])
    request = TextRequest([1], 9, decoder=tokenizer.stream(), stop=(stop,))
    request.processors = Processors(Processing(min_tokens=least), [1], [])
    shown = ""
    for byte in "a\n\n\néa".encode():
        if request.finish_reason is None:
            request.commit(259 if byte == 97 else 3 + byte, 0.0)
            shown += request.release()
    assert (len(request.ids), request.text, shown) == (count, text, text)


def test_end_of_text_token_shows_no_text() -> None:
    model = text_model()
    plain = generate(model, BYTES, "hello", max_tokens=30, drafts=0)
    at = next(i for i, token in enumerate(plain.ids) if i >= 5 and token not in plain.ids[:i])
    with torch.no_grad():  # <|eos|> takes the place of the token that plain decoding picks there
        model.lm_head.weight[257] = 1.5 * model.lm_head.weight[plain.ids[at]]
    for drafts in range(4):
        found = generate(model, BYTES, "hello", max_tokens=30, drafts=drafts)
        assert found.ids == [*plain.ids[:at], 257]
        assert (found.text, found.finish_reason) == (plain.text[:at], "stop")
        ignored = generate(model, BYTES, "hello", max_tokens=30, drafts=drafts, ignore_eos=True)
        assert (len(ignored.ids), ignored.finish_reason) == (30, "length")
        assert ignored.ids[: at + 1] == found.ids


def pieces_of(prompt: str, **options: object) -> tuple[list[str], Generation]:
    parts = list(stream(TEXT, BYTES, prompt, **options))
    assert [done is not None for _, done in parts] == [False] * (len(parts) - 1) + [True]
    return [piece for piece, _ in parts], parts[-1][1]


@pytest.mark.parametrize("temperature", [0.0, 1.2])
@pytest.mark.parametrize("drafts", [0, 3])
def test_stream_joins_to_the_text(drafts: int, temperature: float) -> None:
    for seed in range(4):  # at temperature 1.2 characters come in parts, and broken
        options = {"max_tokens": 40, "drafts": drafts, "temperature": temperature, "seed": seed}
        pieces, done = pieces_of("some text", **options)
        assert "".join(pieces) == done.text == BYTES.decode(done.ids)
        assert len(pieces) == 1 + len(done.steps)
        assert done == generate(TEXT, BYTES, "some text", **options)


def test_a_character_cut_by_the_limit_is_marked() -> None:
    model = text_model()
    plain = generate(model, BYTES, "hello", max_tokens=30, drafts=0)
    at = next(i for i, token in enumerate(plain.ids) if i >= 5 and token not in plain.ids[:i])
    with torch.no_grad():  # the first byte of a character of two takes that token's place
        model.lm_head.weight[0xC3] = 1.5 * model.lm_head.weight[plain.ids[at]]
    for drafts in (0, 3):
        found = generate(model, BYTES, "hello", max_tokens=at + 1, drafts=drafts)
        assert (found.ids, found.text) == ([*plain.ids[:at], 0xC3], plain.text[:at] + "\ufffd")
        pieces = [piece for piece, _ in stream(model, BYTES, "hello", max_tokens=at + 1, drafts=drafts)]
        assert "".join(pieces) == found.text


def test_stream_holds_back_what_may_become_a_stop(oracle_text: tuple[str, Generation]) -> None:
    prompt, plain = oracle_text
    # The earliest place from which five characters have not stood before, so that the stop ends exactly there.
    start = next(i for i in range(6, 25) if plain.text.find(plain.text[i : i + 5]) == i)
    stop = plain.text[start : start + 5]
    for drafts in (0, 3):
        pieces, done = pieces_of(prompt, max_tokens=30, stop=stop, drafts=drafts)
        assert "".join(pieces) == done.text == plain.text[:start]
    pieces, _ = pieces_of(prompt, max_tokens=30, stop=stop, drafts=0)
    assert pieces[start : start + 5] == [""] * 5  # one token is one character: the stop's own were held back
    # A beginning that does not become the stop is shown once that is clear, or at the end.
    for size in range(1, 5):
        almost = plain.text[start : start + size] + absent(plain.text)
        pieces, done = pieces_of(prompt, max_tokens=30, stop=almost, drafts=0)
        assert "".join(pieces) == done.text == plain.text
        assert pieces[start : start + size] == [""] * size
    ends = plain.text[28:] + absent(plain.text)
    pieces, done = pieces_of(prompt, max_tokens=30, stop=ends, drafts=3)
    assert "".join(pieces) == done.text == plain.text


def test_several_stops_never_take_text_back() -> None:
    plain = generate(TEXT, BYTES, "hello", max_tokens=30, drafts=0).text
    for i in range(2, 26, 3):
        stops = (plain[i : i + 4], plain[i + 1 : i + 3] + absent(plain), plain[i - 2 : i + 1] + absent(plain))
        shown, final = "", plain[: plain.find(stops[0])]
        for piece, _ in stream(TEXT, BYTES, "hello", max_tokens=30, stop=stops, drafts=3):
            shown += piece
            assert final.startswith(shown)
        assert shown == final == generate(TEXT, BYTES, "hello", max_tokens=30, stop=stops, drafts=0).text


# Errors


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"drafts": 4}, "drafts = 4, but a model with 4 heads drafts 0 to 3"),
        ({"drafts": -1}, "drafts = -1"),
        ({"max_tokens": 256}, "exceed the model's 256 positions"),
        ({"max_tokens": 0}, "max_tokens = 0"),
        ({"stop": ""}, "stop string must not be empty"),
        ({"stop": ["a", ""]}, "stop string must not be empty"),
        ({"temperature": -1.0}, "temperature = -1.0"),
        ({"temperature": float("nan")}, "temperature = nan"),
        ({"top_p": 0.0}, "top_p = 0.0"),
        ({"batch_size": 0}, "batch_size = 0"),
        ({"seed": (1 << 63) - 1}, "does not fit 64 bits"),  # of the second prompt
    ],
)
def test_bad_options_are_one_line(options: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError) as error:
        generate(TEXT, BYTES, ["fine", "hello"], **{"max_tokens": 4, **options})
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_a_prompt_that_fills_the_model_exactly_is_fine() -> None:
    model = tiny_model(max_position_embeddings=16)
    (full,) = speculative_is_plain(model, [[1, 2, 3, 4]], 3, Sampling(1.0), (12,))
    assert len(full.ids) == 12
    logprobs_are_targets(model, full)
    with pytest.raises(ConfigError, match="prompt of 5 tokens \\+ 12 new ones exceed the model's 16 positions"):
        run(model, [[1, 2, 3, 4], [1, 2, 3, 4, 5]], 3, max_tokens=12)
    with pytest.raises(ConfigError, match="holds no token"):
        run(model, [[]], 3, max_tokens=2)


def test_seeds_reach_the_ends_of_int64() -> None:
    outputs = [run(VAGUE, [[1, 2]], 3, Sampling(1.0), seeds=[seed])[0].ids for seed in (-(2**63), -1, 0, 2**63 - 1)]
    assert all(a != b for a, b in pairwise(outputs))
    assert generate(TEXT, BYTES, ["fine", "hello"], seed=2**63 - 2, max_tokens=2)[1].seed == 2**63 - 1
