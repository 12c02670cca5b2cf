"""Run by test_hf_class.py with transformers and without foretoken: `hf_class_worker.py MODEL REQUEST.json`.

Writes one JSON object to the request's `answer`: for every number of drafts the ids behind each prompt, and what was
drafted and accepted.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def counted(model: Any) -> list[tuple[int, int]]:
    """Makes `model` note what each step drafts and accepts in the list that is returned."""
    steps: list[tuple[int, int]] = []
    make = model._get_candidate_generator

    def generator(**kwargs: Any) -> Any:
        made = make(**kwargs)
        candidates, drafted = made.get_candidates, [0]

        def get_candidates(input_ids: Any, **rest: Any) -> Any:
            ids, logits = candidates(input_ids, **rest)
            drafted[0] = ids.shape[1] - input_ids.shape[1]
            return ids, logits

        made.get_candidates = get_candidates
        made.update_candidate_strategy = lambda ids, scores, matches: steps.append((drafted[0], int(matches)))
        return made

    model._get_candidate_generator = generator
    return steps


def main(folder: str, request: dict[str, Any]) -> dict[str, Any]:
    sys.modules["foretoken"] = None  # type: ignore[assignment] - as if it were not installed
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    steps, results = counted(model), {}
    for drafts in request["drafts"]:
        steps.clear()
        ids = []
        for prompt in request["prompts"]:
            more = {"use_mtp": True, "num_assistant_tokens": drafts} if drafts else {}
            out = model.generate(
                torch.tensor([prompt]), max_new_tokens=request["tokens"], do_sample=False, eos_token_id=None, **more
            )
            ids.append(out[0, len(prompt) :].tolist())
        results[str(drafts)] = {
            "ids": ids,
            "drafted": sum(d for d, _ in steps),
            "accepted": sum(a for _, a in steps),
        }
    model.save_pretrained(request["again"])
    tokenizer.save_pretrained(request["again"])
    return {
        "class": type(model).__name__,
        "text": tokenizer.decode(request["prompts"][0], skip_special_tokens=True),
        "results": results,
    }


if __name__ == "__main__":
    asked = json.loads(Path(sys.argv[2]).read_text())
    Path(asked["answer"]).write_text(json.dumps(main(sys.argv[1], asked)))
