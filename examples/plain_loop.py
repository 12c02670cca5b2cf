"""Heads on a transformers Llama in a plain PyTorch loop: python examples/plain_loop.py OUT"""

import sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from foretoken import attach_heads, mtp_loss, scales, targets, valid_counts
from foretoken.tokenizer import byte_tokenizer

n, T, steps = 4, 64, 50
tokenizer = byte_tokenizer()
text = torch.tensor(tokenizer.encode(Path(__file__).read_text(encoding="utf-8") * 20))
shape = LlamaConfig(
    vocab_size=tokenizer.vocab_size, hidden_size=64, intermediate_size=192, num_hidden_layers=3, num_attention_heads=4,
    max_position_embeddings=256,
)  # fmt: skip
llama = LlamaForCausalLM(shape)  # or LlamaForCausalLM.from_pretrained(...)

model = attach_heads(llama, n_future=n)
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
for step in range(steps):
    starts = torch.randint(0, len(text) - T - n, (8,))
    windows = torch.stack([text[start : start + T + n] for start in starts])  # T positions and the n tokens behind
    one_document, all_count = torch.zeros_like(windows), torch.ones_like(windows, dtype=torch.bool)
    labels = targets(windows, one_document, all_count, n)  # (n, B, T): no shift anywhere else
    loss = mtp_loss(model(windows, T), model.unembedding, labels, scales([1.0] * n, valid_counts(labels)))
    loss.total.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 10 == 0:
        print(step, (loss.sums / valid_counts(labels)).tolist())  # each head's loss in nats
print("saved", model.save(sys.argv[1], tokenizer))
