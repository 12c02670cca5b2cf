"""A prompt on its way through the decode loop, and what each step did for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from foretoken.processors import Change, Processors


@dataclass(frozen=True)
class Step:
    """One forward after the prefill: the tokens drafted for it, how many the target accepted, how many it committed.

    committed is accepted + 1 unless the request ended inside the block.
    """

    drafted: tuple[int, ...]
    accepted: int
    committed: int


@dataclass
class Request:
    """A prompt and what follows it. `commit` is called token by token, so an end cuts inside a block."""

    prompt: list[int]
    max_tokens: int
    seed: int = 0
    end_ids: frozenset[int] = frozenset()
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    finish_reason: str | None = None
    processors: Processors | None = None

    def commit(self, token: int, logprob: float) -> None:
        """Append a token with the target's log-probability of it; sets `finish_reason` when it is the last."""
        self.ids.append(token)
        self.logprobs.append(logprob)
        if token in self.end_ids or (self.processors is not None and self.processors.complete(self.ids)):
            self.finish_reason = "stop"
        elif len(self.ids) >= self.max_tokens:
            self.finish_reason = "length"

    @property
    def length(self) -> int:
        """Prompt and committed tokens."""
        return len(self.prompt) + len(self.ids)


def changes(requests: Sequence[Request], further: Callable[[int], Sequence[Sequence[int]]]) -> Change | None:
    """What the requests' processors make of logits (B, k, V); None where no request has any.

    further(row): for each of its k places the tokens before it that are not committed yet.
    """
    if all(request.processors is None for request in requests):
        return None

    def change(logits: Tensor) -> Tensor:
        changed = logits.clone()
        for row, request in enumerate(requests):
            if request.processors is not None:
                for index, tokens in enumerate(further(row)):
                    changed[row, index] = request.processors.apply(logits[row, index], request.ids, tokens)
        return changed

    return change
