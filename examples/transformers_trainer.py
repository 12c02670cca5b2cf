"""Heads on a transformers Llama under `transformers.Trainer`: python examples/transformers_trainer.py OUT

Trainers derived from it, such as TRL's for instructions, take the same `compute_loss`.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from foretoken import attach_heads, mtp_loss, scales, targets, valid_counts
from foretoken.tokenizer import byte_tokenizer

n = 4
tokenizer = byte_tokenizer()
shape = LlamaConfig(
    vocab_size=tokenizer.vocab_size, hidden_size=64, intermediate_size=192, num_hidden_layers=3, num_attention_heads=4,
    max_position_embeddings=256,
)  # fmt: skip
llama = LlamaForCausalLM(shape)  # or LlamaForCausalLM.from_pretrained(...)


class MTPTrainer(Trainer):
    """Rows are `input_ids` (B, T + n) and `labels`, which are -100 where nothing is to be learned: prompts, padding."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
        """The heads' losses, each the mean over its own targets; of accumulated steps the Trainer takes the mean."""
        windows = inputs["input_ids"]
        labels = targets(windows, torch.zeros_like(windows), inputs["labels"] != -100, n)
        hidden = model(windows, windows.size(1) - n)
        weight = self.accelerator.unwrap_model(model).unembedding
        loss = mtp_loss(hidden, weight, labels, scales([1.0] * n, valid_counts(labels))).total
        return (loss, hidden) if return_outputs else loss


text = tokenizer.encode(Path(__file__).read_text(encoding="utf-8") * 20)
rows = [torch.tensor(text[start : start + 64 + n]) for start in range(0, len(text) - 64 - n, 64)]
data = [{"input_ids": row, "labels": row} for row in rows]
with tempfile.TemporaryDirectory() as folder:
    arguments = TrainingArguments(
        folder, max_steps=50, per_device_train_batch_size=8, learning_rate=2e-3, logging_steps=10, report_to=[],
        save_strategy="no", remove_unused_columns=False, use_cpu=not torch.cuda.is_available(),
    )  # fmt: skip
    trainer = MTPTrainer(model=attach_heads(llama, n_future=n), args=arguments, train_dataset=data)
    trainer.train()
print("saved", trainer.model.save(sys.argv[1], tokenizer))
