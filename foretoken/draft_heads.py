"""Drafters of the head kinds that no compiled step drafts with: their drafts are picked behind the verification."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from foretoken.cache import KVCache, Window
from foretoken.draft import Drafter, ParallelDrafter, Proposal, Start, chained, last_of, padded
from foretoken.heads import DeepSeekHeads, JointBlock
from foretoken.layers import Context, attention
from foretoken.model import Stepper
from foretoken.request import Request
from foretoken.sampling import Keys


class StackedDrafter(ParallelDrafter):
    """Heads on top of each other: all of them ran with head 1."""

    compiled = False


class LinearDrafter(StackedDrafter):
    """Matrices on head 1's state, which are multiplied where drafts start and nowhere else."""

    heads = 1

    @torch.inference_mode()
    def states(self, hidden: Tensor, at: Sequence[int]) -> Tensor:
        """See `ParallelDrafter`."""
        heads = self.stepper.model.heads
        first = last_of(hidden[0], at).to(self.stepper.model.dtype)  # (B, 1, D)
        return torch.cat([first + heads[depth](first) for depth in range(1, self.drafts + 1)], 1)


class JointDrafter(StackedDrafter):
    """Parallel heads that ran with head 1; drafts are drawn left to right, each told of the one before it."""

    def propose(self, start: Start, cache: KVCache | None) -> Proposal:
        """See `Drafter`."""
        states, model = self.states(start.hidden, start.at), self.stepper.model
        last = torch.tensor([tokens[-1:] for tokens in start.following], device=model.device)

        def told(picks: list[Tensor]) -> Tensor:
            depth = len(picks) + 1
            block = model.heads[depth]
            assert isinstance(block, JointBlock)
            mapped = block.before(F.embedding(picks[-1] if picks else last, model.embed_tokens.weight))
            added: Tensor = mapped.to(states.dtype)
            return states[:, depth - 1 : depth] + added

        return chained(self, start, self.stepper, told)


class DeepSeekDrafter(Drafter):
    """A depth after the other, each over its own keys, which are those of true tokens once these are known.

    At the last position every depth but the first reads drafts, at those before it depth d reads up to d - 2 of them.
    So a step runs all depths again over the last n - 2 positions, from head 1's states there, which are kept.
    """

    compiled = False
    cache: KVCache

    def __init__(self, stepper: Stepper, drafts: int, rows: int, capacity: int) -> None:
        super().__init__(stepper, drafts)
        self.cache = stepper.new_draft_cache(rows, capacity, max(1, drafts))
        self.cache.select([])
        self.kept: list[Tensor] = []  # of each row head 1's states (up to n - 2, D)

    def join(self, request: Request, hidden: Tensor, z: Tensor, keys: Keys) -> list[int]:
        """See `Drafter`."""
        held, self.kept = self.kept, [hidden.new_empty(0, hidden.size(-1))]
        drafts = super().join(request, hidden, z, keys)
        self.kept = held + self.kept
        return drafts

    def stand(self, lengths: Sequence[int]) -> None:
        """See `Drafter`."""
        super().stand(lengths)
        model = self.stepper.model
        kept = torch.zeros(model.config.n_future - 2, model.config.hidden_size, dtype=model.dtype, device=model.device)
        self.kept = [kept for _ in lengths]

    def select(self, rows: Sequence[int]) -> None:
        """See `Drafter`."""
        super().select(rows)
        self.kept = [self.kept[row] for row in rows]

    @torch.inference_mode()
    def propose(self, start: Start, cache: KVCache | None) -> Proposal:
        """See `Drafter`."""
        assert cache is not None
        hidden, texts = start.hidden[0], start.texts
        device = hidden.device
        whole = [torch.cat((old, row[: last + 1])) for old, row, last in zip(self.kept, hidden, start.at, strict=True)]
        self.kept = [row[max(0, len(row) - self.stepper.config.n_future + 2) :] for row in whole]
        cache.lengths = [len(text) - 1 for text in texts]  # the last token has been through no position yet
        ends, count = torch.tensor(cache.lengths, device=device)[:, None], max(map(len, whole))
        # Rows with fewer positions run their first one several times.
        states = torch.stack([torch.cat((row[:1].expand(count - len(row), -1), row)) for row in whole])
        starts = ends - torch.tensor([len(row) for row in whole], device=device)[:, None]
        positions = (ends + torch.arange(-count, 0, device=device)).maximum(starts)  # (B, W)
        text = padded([[*ids, *[0] * self.drafts] for ids in texts], device)
        window = Window(cache, len(texts), max(cache.lengths))

        def state(picks: list[Tensor]) -> Tensor:
            nonlocal states
            if picks:
                text.scatter_(1, ends + len(picks), picks[-1])
            states = self._depth(len(picks) + 1, text, states, positions, window)
            return states[:, -1:]

        return chained(self, start, self.stepper, state)

    def _depth(self, depth: int, text: Tensor, states: Tensor, positions: Tensor, window: Window) -> Tensor:
        """States (B, W, D) of a depth at `positions` (B, W), from those of the depth before and the text (B, any)."""
        model = self.stepper.model
        assert isinstance(model.heads, DeepSeekHeads)
        block = model.heads.at(depth)
        embedded = F.embedding(text.gather(1, positions + depth), model.embed_tokens.weight)
        x = block.join(embedded, states.to(embedded.dtype))
        context = Context(*model.rotary(positions))
        q, k, v = block.self_attn.project(block.input_layernorm(x), context)
        keys, values = window.write(depth - 1, k.transpose(1, 2)[None], v.transpose(1, 2)[None], positions)
        visible = torch.arange(keys.size(3), device=x.device) <= positions[:, :, None]  # (B, W, S)
        y = attention(q, keys[0].transpose(1, 2), values[0].transpose(1, 2), visible[:, None])
        x = x + block.self_attn.o_proj(y.flatten(2))
        return x + block.mlp(block.post_attention_layernorm(x))  # type: ignore[no-any-return]
