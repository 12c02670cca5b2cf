"""Small trained models with their drafters, and what any engine must write and count behind the same prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import engine_oracle
from engine_oracle import Counts
from tiny_engine_model import TOKENS

from foretoken.formats.eagle3 import export_eagle3
from foretoken.formats.gguf import export_gguf
from foretoken.tokenizer import Tokenizer

KINDS = ("sequential", "parallel")
DRAFTS = (1, 2, 3)
AHEAD = 3  # ids that the oracle knows behind the last one that is asked for


@dataclass
class Trained:
    """A small trained model, its drafter, and what transformers writes behind the prompts."""

    kind: str
    checkpoint: Path
    drafter: Path
    files: list[Path]
    tokenizer: Tokenizer
    prompts: list[list[int]]
    outputs: list[list[int]]

    @property
    def texts(self) -> list[str]:
        return [self.tokenizer.decode(output[:TOKENS]) for output in self.outputs]

    def counts(self, drafts: int) -> tuple[Counts, Counts]:
        coming = [output[: TOKENS + drafts] for output in self.outputs]
        return engine_oracle.count_drafts(self.checkpoint, self.drafter, self.prompts, coming, TOKENS, drafts)

    def counts_of_all_heads(self, drafts: int) -> tuple[Counts, Counts]:
        coming = [output[: TOKENS + drafts] for output in self.outputs]
        heads = self.checkpoint / "mtp_heads"
        return engine_oracle.count_drafts(self.checkpoint, heads, self.prompts, coming, TOKENS, drafts)


def exported(kind: str, checkpoint: Path, tokenizer: Tokenizer, texts: Sequence[str]) -> Trained:
    drafter = export_eagle3(checkpoint, checkpoint.parent / "eagle3")
    files = export_gguf(checkpoint, checkpoint.parent / "gguf", "f32")
    prompts = [tokenizer.encode(text, add_special_tokens=True) for text in texts]
    outputs = engine_oracle.greedy(checkpoint, prompts, TOKENS, AHEAD)
    return Trained(kind, checkpoint, drafter, files, tokenizer, prompts, outputs)
