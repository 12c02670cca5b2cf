"""Decoding measured beside its baseline in the same run: the same prompts plainly and with drafts, in turn."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any, TypeVar

from foretoken.completion import Generation, Options, begin, finished
from foretoken.display import Display
from foretoken.errors import ConfigError, DataError
from foretoken.model import Model
from foretoken.sampling import Accept
from foretoken.tokenizer import Tokenizer

Item = TypeVar("Item")
PROMPT_BYTES = 128
SAMPLED_TEMPERATURE = 0.8


@dataclass(frozen=True)
class Way:
    """How drafts are made and accepted: see `Options`."""

    drafts: int | None
    accept: Accept = "keyed"
    nodes: int | None = None

    @property
    def name(self) -> str:
        """In words, such as "3 drafts, rejection"."""
        how = "as many drafts as pay" if self.drafts is None else f"{self.drafts} drafts"
        how += "" if self.nodes is None else f", tree of {self.nodes}"
        return how if self.accept == "keyed" else f"{how}, {self.accept}"


PLAIN = Way(0)
SHORT, REPEATS = 0.1, 5  # seconds of a continuation, and how often one that takes no longer is timed


@dataclass(frozen=True)
class Comparison:
    """The same prompts decoded plainly and with drafts, with the seconds that what followed the first token took."""

    temperature: float
    plain: list[Generation]
    drafted: list[Generation]
    plain_seconds: list[float]
    drafted_seconds: list[float]

    @property
    def outputs_equal(self) -> bool:
        """Whether every prompt gave the same ids both ways."""
        return all(a.ids == b.ids for a, b in zip(self.plain, self.drafted, strict=True))

    def accepted_by_position(self) -> list[float]:
        """For each drafted position, the share of steps whose drafts were accepted up to it."""
        steps = [step for generation in self.drafted for step in generation.steps]
        most = max((len(step.drafted) for step in steps), default=0)
        return [sum(step.accepted > k for step in steps) / len(steps) for k in range(most)]

    def figures(self) -> dict[str, Any]:
        """Tokens per step, step cost, speedup and what they rest on; the prompt's reading is in no time."""
        steps = sum(len(g.steps) for g in self.drafted)
        plain_steps = sum(len(g.steps) for g in self.plain)
        plain, drafted = sum(self.plain_seconds), sum(self.drafted_seconds)
        ratios = sorted(a / b for a, b in zip(self.plain_seconds, self.drafted_seconds, strict=True))
        taken = [step for g in self.drafted for step in g.steps]
        return {
            "tokens_per_step": sum(step.committed for step in taken) / max(1, steps),
            "drafts_per_step": sum(len(step.drafted) for step in taken) / max(1, steps),
            "step_cost": (drafted / max(1, steps)) / (plain / max(1, plain_steps)),
            "speedup": plain / drafted,
            "speedup_range": [ratios[0], statistics.median(ratios), ratios[-1]],
            "milliseconds_per_token": {
                "plain": 1e3 * plain / max(1, sum(len(g.ids) - 1 for g in self.plain)),
                "self_speculative": 1e3 * drafted / max(1, sum(len(g.ids) - 1 for g in self.drafted)),
            },
            "accepted_by_position": self.accepted_by_position(),
            "outputs_equal": self.outputs_equal,
            "distinct_8grams": distinct_ngrams([g.ids for g in self.plain], 8),
        }


def compare(
    model: Model,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    temperature: float,
    max_tokens: int,
    seed: int,
    display: Display,
    ways: Sequence[Way],
) -> dict[Way, Comparison]:
    """Decode every prompt plainly and in each way, in turn, so that all meet the same machine.

    Short continuations, which others' work on the machine can double, several times: the median is taken.
    """
    runs: dict[Way, tuple[list[Generation], list[float]]] = {way: ([], []) for way in dict.fromkeys((PLAIN, *ways))}
    for way in runs:  # warm up
        _timed(model, tokenizer, prompts[0], {"max_tokens": 16, "temperature": temperature}, way)
    for index, prompt in enumerate(prompts):
        options: Options = {
            "max_tokens": max_tokens, "temperature": temperature, "seed": seed + index, "ignore_eos": True,
        }  # fmt: skip
        timed: dict[Way, list[tuple[Generation, float]]] = {way: [] for way in runs}
        for _ in range(REPEATS):
            for way, found in timed.items():
                found.append(_timed(model, tokenizer, prompt, options, way))
            if max(found[0][1] for found in timed.values()) > SHORT:
                break
        for way, (generations, seconds) in runs.items():
            generation, took = sorted(timed[way], key=lambda pair: pair[1])[len(timed[way]) // 2]
            generations.append(generation)
            seconds.append(took)
        last = index + 1 == len(prompts)
        display.progress(f"Decoding held-out prompts at temperature {temperature:g}: {index + 1}/{len(prompts)}", last)
    return {way: Comparison(temperature, runs[PLAIN][0], runs[way][0], runs[PLAIN][1], runs[way][1]) for way in ways}


def _timed(model: Model, tokenizer: Tokenizer, prompt: str, options: Options, way: Way) -> tuple[Generation, float]:
    """A generation, and the seconds that what followed its first token took."""
    how: Options = {"drafts": way.drafts, "accept": way.accept, "nodes": way.nodes}
    requests, loop = begin(model, tokenizer, [prompt], {**options, **how})
    next(loop)
    began = time.perf_counter()
    for _ in loop:
        pass
    seconds = time.perf_counter() - began
    return finished(prompt, requests[0]), seconds


def held_out_prompts(texts: Sequence[str], count: int, where: str = "the held-out text") -> list[str]:
    """`count` beginnings of lines with what precedes them, spread evenly over the held-out texts.

    Raises DataError, which says `where`, if all texts are too short to cut prompts from.
    """
    texts = _long_enough(texts, where)
    rounds = -(-count // len(texts))
    turns = enumerate(islice(cycle(texts), count))
    return [_prompt(text, len(text) * (i // len(texts) + 1) // (rounds + 1)) for i, text in turns]


def further_prompts(texts: Sequence[str], count: int, where: str) -> list[str]:
    """As `held_out_prompts`, but the first of many are the same as of few."""
    texts = _long_enough(texts, where)
    golden = (5**0.5 - 1) / 2  # whose multiples, without their whole part, lie evenly however many they are
    turns = enumerate(islice(cycle(texts), count))
    return [_prompt(text, int(len(text) * ((i // len(texts) + 1) * golden % 1))) for i, text in turns]


def _long_enough(texts: Sequence[str], where: str) -> list[str]:
    texts = [text for text in texts if len(text) > 4 * PROMPT_BYTES]
    if not texts:
        raise DataError(f"{where}: no text of more than {4 * PROMPT_BYTES} characters to take prompts from")
    return texts


def _prompt(text: str, at: int) -> str:
    """What precedes the end of the line at a place of a text."""
    end = text.find("\n", max(at, PROMPT_BYTES)) + 1 or len(text)
    return text[:end].encode()[-PROMPT_BYTES:].decode("utf-8", "ignore")


def whole_prompts(texts: Sequence[str], count: int) -> list[str]:
    """`count` of the texts, as they stand, spread evenly over them; all where there are fewer."""
    count = min(count, len(texts))
    return [texts[len(texts) * index // count] for index in range(count)]


def distinct_ngrams(sequences: Sequence[Sequence[int]], n: int) -> float:
    """Share of the sequences' n-grams that are different ones: near 1 for varied text, small for loops."""
    grams = [tuple(ids[i : i + n]) for ids in sequences for i in range(len(ids) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 1.0


def once(named: Iterable[Item]) -> tuple[Item, ...]:
    """In this order, and what is named twice once: it would be timed again, and be two rows of one thing."""
    return tuple(dict.fromkeys(named))


def check_out(path: Path | None) -> None:
    """Raises ConfigError where a result could not be written to `path`: asked before minutes are spent on it."""
    if path is None:
        return
    if path.is_dir():
        raise ConfigError(f"--out {path}: is a directory; name a file")
    if not path.parent.is_dir():
        raise ConfigError(f"--out {path}: there is no directory {path.parent}; make it first")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ConfigError(f"--out {path}: no permission to write there")
