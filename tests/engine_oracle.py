"""What any engine must produce from a checkpoint: greedy ids, and how many drafts it makes and accepts.

Full recomputation without a cache, in float32, sharing no code with the decode loop: the trunk and head 1 through
transformers' Llama, the drafter through a plain EAGLE-3 layer written here.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
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


class EagleLayer:
    """An EAGLE-3 drafter directory, read as engines read it. lm_head: the target's."""

    def __init__(self, folder: Path, embedding: Tensor, lm_head: Tensor, aux_layer: int) -> None:
        self.w = {name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()}
        self.c = json.loads((folder / "config.json").read_text())
        self.embedding, self.lm_head = embedding, lm_head
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
    model = _llama(checkpoint)
    trunk_layer = model.config.num_hidden_layers - 1
    layer = EagleLayer(drafter, model.get_input_embeddings().weight, model.lm_head.weight, trunk_layer)
    total, cut = Counts(by_position=[0] * drafts), Counts(by_position=[0] * drafts)
    for prompt, output in zip(prompts, outputs, strict=True):
        sequence = torch.tensor([prompt + output])
        z = list(model(sequence, output_hidden_states=True).hidden_states[trunk_layer][0])
        generated = 1
        while generated < tokens:
            known = prompt + output[:generated]
            fed, states, proposed = known[1:], layer.read(z[: len(known) - 1]), list[int]()
            for _ in range(drafts):
                token, state = layer(fed, states)
                proposed.append(token)
                fed, states = [*fed, token], [*states, state]
            generated += _count((total, cut), proposed, output[generated : generated + drafts], tokens - generated)
    return total, cut


@torch.no_grad()
def count_parallel_drafts(
    checkpoint: Path, prompts: list[list[int]], outputs: list[list[int]], tokens: int, drafts: int
) -> tuple[Counts, Counts]:
    """As `count_drafts`, for parallel heads that all draft: head i is a Llama whose last layer is that head."""
    model = _llama(checkpoint)
    stored = load_file(checkpoint / "mtp_heads" / "model.safetensors")
    total, cut = Counts(by_position=[0] * drafts), Counts(by_position=[0] * drafts)
    choices: list[list[list[int]]] = []  # by head, by prompt
    for head in range(drafts):
        own = {name: t for name, t in stored.items() if name.startswith(f"heads.{head}.")}
        model.model.layers[-1].load_state_dict({name.split(".", 2)[2]: t for name, t in own.items()})
        whole = (torch.tensor([prompt + output]) for prompt, output in zip(prompts, outputs, strict=True))
        choices.append([model(sequence).logits[0].argmax(-1).tolist() for sequence in whole])
    for number, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
        generated = 1
        while generated < tokens:
            at = len(prompt) + generated - 2  # the newest token has not been read
            proposed = [own[number][at] for own in choices]
            generated += _count((total, cut), proposed, output[generated : generated + drafts], tokens - generated)
    return total, cut


def _count(both: tuple[Counts, Counts], proposed: list[int], coming: list[int], left: int) -> int:
    """Count one step in the whole and the cut counts; returns how many tokens it commits."""
    drafts = len(proposed)
    right = next((i for i, (a, b) in enumerate(zip(proposed, coming, strict=True)) if a != b), drafts)
    for counts, room in zip(both, (drafts, min(drafts, left - 1)), strict=True):
        counts.steps += 1
        counts.drafted += room
        counts.accepted += min(right, room)
        counts.by_position = [n + (i < min(right, room)) for i, n in enumerate(counts.by_position)]
    return right + 1


def _llama(checkpoint: Path):  # type: ignore[no-untyped-def]
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation="eager").eval()
