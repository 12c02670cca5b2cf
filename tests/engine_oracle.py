"""What any engine must produce from a checkpoint: greedy ids, and how many drafts it makes and accepts.

Full recomputation without a cache, in float32, sharing no code with the decode loop: the trunk and head 1 through
transformers' model, an EAGLE-3 drafter through a plain layer written here, parallel heads through transformers' model
with each head in the place of the last layer.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor


@dataclass
class Counts:
    """Draft steps, tokens drafted and accepted, and accepted by position."""

    steps: int = 0
    drafted: int = 0
    accepted: int = 0
    by_position: list[int] = field(default_factory=list)

    def __add__(self, more: Counts) -> Counts:
        by_position = [a + b for a, b in zip_longest(self.by_position, more.by_position, fillvalue=0)]
        return Counts(self.steps + more.steps, self.drafted + more.drafted, self.accepted + more.accepted, by_position)


class EagleLayer:
    """An EAGLE-3 drafter directory, read as engines read it. lm_head: the target's, where it holds none."""

    def __init__(self, folder: Path, embedding: Tensor, lm_head: Tensor, aux_layer: int) -> None:
        self.w = {name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()}
        self.c = json.loads((folder / "config.json").read_text())
        self.embedding, self.lm_head = embedding, self.w.get("lm_head.weight", lm_head)
        assert self.c["eagle_aux_hidden_state_layer_ids"][-1] == aux_layer

    def __call__(self, tokens: list[int], hidden: list[Tensor]) -> tuple[int, Tensor]:
        """From (token, hidden) rows at positions 0, 1, ..: the last row's choice and its state, not normalised."""
        w, c = self.w, self.c
        residual = torch.stack(hidden)
        rows, heads, width = len(tokens), c["num_attention_heads"], c["head_dim"]
        both = torch.cat(
            (
                self._norm(self.embedding[torch.tensor(tokens)], "midlayer.input_layernorm"),
                self._norm(residual, "midlayer.hidden_norm"),
            ),
            -1,
        )
        q, k, v = (both @ w[f"midlayer.self_attn.{n}_proj.weight"].T for n in "qkv")
        q, k = (self._rotate(t.view(rows, -1, width)) for t in (q, k))
        groups = heads // c["num_key_value_heads"]
        k, v = (t.view(rows, -1, width).repeat_interleave(groups, 1) for t in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) / width**0.5
        scores = scores.masked_fill(torch.ones(rows, rows).triu(1).bool(), float("-inf"))
        y = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).reshape(rows, -1)
        x = residual + y @ w["midlayer.self_attn.o_proj.weight"].T
        z = self._norm(x, "midlayer.post_attention_layernorm")
        gate, up = z @ w["midlayer.mlp.gate_proj.weight"].T, z @ w["midlayer.mlp.up_proj.weight"].T
        x = (x + (F.silu(gate) * up) @ w["midlayer.mlp.down_proj.weight"].T)[-1]
        return int((self.lm_head @ self._norm(x, "norm")).argmax()), x

    def read(self, aux: list[Tensor]) -> list[Tensor]:
        """`fc` over three layers' outputs, of which all but the last have no weight."""
        return [self.w["fc.weight"] @ torch.cat((torch.zeros_like(z), torch.zeros_like(z), z)) for z in aux]

    def _norm(self, x: Tensor, name: str) -> Tensor:
        scaled = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.c["rms_norm_eps"])
        return scaled * self.w[f"{name}.weight"]

    def _rotate(self, x: Tensor) -> Tensor:
        half = x.size(-1) // 2
        theta = self.c["rope_parameters"]["rope_theta"] ** (-torch.arange(half) / half)
        angles = torch.arange(x.size(0))[:, None, None] * theta
        a, b = x[..., :half], x[..., half:]
        return torch.cat((a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()), -1)


@torch.no_grad()
def greedy(checkpoint: Path, prompts: list[list[int]], tokens: int, ahead: int = 0) -> list[list[int]]:
    """What transformers' Llama writes: `tokens` ids behind each prompt, and `ahead` more."""
    model = _llama(checkpoint)
    outputs = []
    for prompt in prompts:
        ids = list(prompt)
        for _ in range(tokens + ahead):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        outputs.append(ids[len(prompt) :])
    return outputs


@torch.no_grad()
def count_drafts(
    checkpoint: Path, drafter: Path, prompts: list[list[int]], outputs: list[list[int]], tokens: int, drafts: int
) -> tuple[Counts, Counts]:
    """What drafting `drafts` tokens a step along `outputs` (from `greedy`, with `drafts` more) counts.

    The second result is llama.cpp's way of counting: it never drafts past the limit, so the last steps of a prompt
    draft and accept less, or nothing.
    """
    start = _parallel_heads if _is_parallel(drafter) else _eagle
    drafts_of = start(checkpoint, drafter, drafts)
    total, cut = Counts(by_position=[0] * drafts), Counts(by_position=[0] * drafts)
    for prompt, output in zip(prompts, outputs, strict=True):
        propose = drafts_of(prompt + output)
        generated = 1
        while generated < tokens:
            coming = output[generated : generated + drafts]
            proposed = propose(len(prompt) + generated)
            right = next((i for i, (a, b) in enumerate(zip(proposed, coming, strict=True)) if a != b), drafts)
            for counts, room in ((total, drafts), (cut, min(drafts, tokens - generated - 1))):
                counts.steps += 1
                counts.drafted += room
                counts.accepted += min(right, room)
                counts.by_position = [n + (i < min(right, room)) for i, n in enumerate(counts.by_position)]
            generated += right + 1
    return total, cut


# From the number of tokens known, of a text, to the drafts behind them.
Proposer = Callable[[int], list[int]]


def _eagle(checkpoint: Path, drafter: Path, drafts: int) -> Callable[[list[int]], Proposer]:
    """An EAGLE-3 layer, which drafts from its own drafts and states."""
    model = _llama(checkpoint)
    trunk_layer = model.config.num_hidden_layers - 1
    layer = EagleLayer(drafter, model.get_input_embeddings().weight, model.lm_head.weight, trunk_layer)

    def drafts_of(text: list[int]) -> Proposer:
        z = list(model(torch.tensor([text]), output_hidden_states=True).hidden_states[trunk_layer][0])

        def propose(known: int) -> list[int]:
            fed, states, proposed = text[1:known], layer.read(z[: known - 1]), list[int]()
            for _ in range(drafts):
                token, state = layer(fed, states)
                proposed.append(token)
                fed, states = [*fed, token], [*states, state]
            return proposed

        return propose

    return drafts_of


def _parallel_heads(checkpoint: Path, drafter: Path, drafts: int) -> Callable[[list[int]], Proposer]:
    """Heads 2, 3, ..: head j at the last position whose next token is known, t, drafts token t + j."""
    weights = load_file(drafter / "model.safetensors")
    heads = []
    for i in range(drafts):
        head, prefix = _llama(checkpoint), f"heads.{i}."
        own = {n.removeprefix(prefix): w.float() for n, w in weights.items() if n.startswith(prefix)}
        if "lm_head.weight" in own:
            head.lm_head.weight = torch.nn.Parameter(own.pop("lm_head.weight"))
        head.model.layers[-1].load_state_dict(own)
        heads.append(head)

    def drafts_of(text: list[int]) -> Proposer:
        choices = [head(torch.tensor([text])).logits[0].argmax(-1).tolist() for head in heads]
        return lambda known: [of_head[known - 2] for of_head in choices]

    return drafts_of


def _is_parallel(drafter: Path) -> bool:
    return json.loads((drafter / "config.json").read_text())["architectures"] == ["MtpHeadsEagle3"]


@torch.no_grad()
def joint(
    checkpoint: Path, prompt: list[int], temperature: float, tokens: int, least: float
) -> dict[tuple[int, ...], float]:
    """The probabilities of the next `tokens` tokens together, where they are at least `least`."""
    model = _llama(checkpoint)
    starts: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(tokens):
        longer = {}
        for start, probability in starts.items():
            logits = model(torch.tensor([[*prompt, *start]])).logits[0, -1].double()
            for token, p in enumerate((logits / temperature).softmax(-1).tolist()):
                if probability * p >= least:
                    longer[*start, token] = probability * p
        starts = longer
    return starts


def _llama(checkpoint: Path):  # type: ignore[no-untyped-def]
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation="eager").eval()
