"""Asks an OpenAI server: `python openai_runner.py URL REQUEST.json ANSWER.json`, in vLLM's environment.

The request: `prompts` (lists of ids) and `tokens`. The answer: `models`; greedy `ids` and `text` of each prompt, every
other one streamed; `usage`, the tokens counted, of the others.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import openai


def ask(url: str, request: dict[str, Any]) -> dict[str, Any]:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=300)
    models = [model.id for model in client.models.list()]
    more = {"ignore_eos": True, "return_token_ids": True}
    ids, texts, usage = [], [], []
    for i, prompt in enumerate(request["prompts"]):
        answer = client.completions.create(
            model=models[0], prompt=prompt, temperature=0, max_tokens=request["tokens"], stream=i % 2 == 1,
            extra_body=more,
        )  # fmt: skip
        parts = [chunk.choices[0] for chunk in answer] if i % 2 else [answer.choices[0]]
        ids.append([token for part in parts for token in (part.token_ids or [])])
        texts.append("".join(part.text for part in parts))
        if i % 2 == 0:
            usage.append(answer.usage.completion_tokens)
    return {"models": models, "ids": ids, "texts": texts, "usage": usage}


if __name__ == "__main__":
    Path(sys.argv[3]).write_text(json.dumps(ask(sys.argv[1], json.loads(Path(sys.argv[2]).read_text()))))
