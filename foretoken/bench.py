"""Decoding measured beside its baseline in the same run: the same prompts plainly and with drafts, in turn."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from foretoken.completion import Generation, Options, generate
from foretoken.display import Display
from foretoken.model import Model
from foretoken.tokenizer import Tokenizer

PROMPT_BYTES = 128
SAMPLED_TEMPERATURE = 0.8


@dataclass(frozen=True)
class Comparison:
    """The same prompts decoded plainly and self-speculatively, with the seconds each took."""

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
        """Tokens per step, step cost, speedup and what they rest on; times are of whole requests, prefill included."""
        steps = sum(len(g.steps) for g in self.drafted)
        plain_steps = sum(len(g.steps) for g in self.plain)
        plain, drafted = sum(self.plain_seconds), sum(self.drafted_seconds)
        ratios = sorted(a / b for a, b in zip(self.plain_seconds, self.drafted_seconds, strict=True))
        return {
            "tokens_per_step": sum(s.committed for g in self.drafted for s in g.steps) / max(1, steps),
            "step_cost": (drafted / max(1, steps)) / (plain / max(1, plain_steps)),
            "speedup": plain / drafted,
            "speedup_range": [ratios[0], statistics.median(ratios), ratios[-1]],
            "milliseconds_per_token": {
                "plain": 1e3 * plain / sum(len(g.ids) for g in self.plain),
                "self_speculative": 1e3 * drafted / sum(len(g.ids) for g in self.drafted),
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
    drafts: Sequence[int],
) -> dict[int, Comparison]:
    """Decode every prompt plainly and with each number of drafts, in turn, so that all meet the same machine."""
    runs: dict[int, tuple[list[Generation], list[float]]] = {k: ([], []) for k in dict.fromkeys((0, *drafts))}
    for k in runs:  # warm up
        generate(model, tokenizer, prompts[0], max_tokens=16, temperature=temperature, drafts=k)
    for index, prompt in enumerate(prompts):
        for k, (generations, seconds) in runs.items():
            began = time.perf_counter()
            options: Options = {
                "max_tokens": max_tokens,
                "temperature": temperature,
                "seed": seed + index,
                "drafts": k,
                "ignore_eos": True,
            }
            generations.append(generate(model, tokenizer, prompt, **options))
            seconds.append(time.perf_counter() - began)
        last = index + 1 == len(prompts)
        display.progress(f"Decoding held-out prompts at temperature {temperature:g}: {index + 1}/{len(prompts)}", last)
    return {k: Comparison(temperature, runs[0][0], runs[k][0], runs[0][1], runs[k][1]) for k in drafts}


def held_out_prompts(texts: Sequence[str], count: int) -> list[str]:
    """`count` beginnings of lines with what precedes them, spread evenly over the held-out texts."""
    texts = [text for text in texts if len(text) > 4 * PROMPT_BYTES]
    prompts = []
    for index in range(count):
        text = texts[index % len(texts)]
        rounds = -(-count // len(texts))
        at = len(text) * (index // len(texts) + 1) // (rounds + 1)
        end = text.find("\n", max(at, PROMPT_BYTES)) + 1 or len(text)
        raw = text[:end].encode()[-PROMPT_BYTES:]
        prompts.append(raw.decode("utf-8", "ignore"))
    return prompts


def distinct_ngrams(sequences: Sequence[Sequence[int]], n: int) -> float:
    """Share of the sequences' n-grams that are different ones: near 1 for varied text, small for loops."""
    grams = [tuple(ids[i : i + n]) for ids in sequences for i in range(len(ids) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 1.0
