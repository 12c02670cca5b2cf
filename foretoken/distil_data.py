"""`foretoken distil-data`: text that a model writes itself, to train heads on what they will have to foresee.

Prompts are beginnings of lines of your text, with what precedes them; the record with seed + i depends on the model,
prompt i and the options that stand in it alone, so a file that was interrupted, or is to hold more, is gone on with.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import torch

from foretoken.bench import further_prompts
from foretoken.chat import end_ids
from foretoken.completion import Options, begin, generate
from foretoken.display import Display
from foretoken.errors import ConfigError
from foretoken.model import Model
from foretoken.tokenizer import Tokenizer


def distil_data(
    model: Model, tokenizer: Tokenizer, texts: Sequence[str], out: str | Path, *, records: int, max_tokens: int,
    temperature: float, seed: int, batch_size: int, display: Display,
) -> int:  # fmt: skip
    """Append records to the JSON Lines file `out` until it holds so many.

    A record is prompt, response, text (both), finish_reason, seed, and what it was made with. A response ends where its
    bytes are no UTF-8, and then, too, its finish_reason is "length". Returns how many records there were before. Raises
    ConfigError for options that cannot be and a file of others, or of another model, DataError for texts too short.
    """
    if records < 1:
        raise ConfigError(f"records = {records} must be at least 1")
    path, prompts = Path(out), further_prompts(texts, records, "the data")
    options: Options = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed, "batch_size": batch_size}
    begin(model, tokenizer, prompts, options)  # what is wrong with them is said before anything is written
    made = {"max_tokens": max_tokens, "temperature": temperature, "model": _fingerprint(model, tokenizer)}
    begun, size = _complete(path)
    for i, record in enumerate(begun[:records]):
        if record != record | made | {"prompt": prompts[i], "seed": seed + i}:
            raise ConfigError(f"{path}: record {i + 1} is of other options or another model; choose another file")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.truncate(size)  # a line that a kill cut short
        for start in range(len(begun), records, batch_size):
            display.progress(f"{start}/{records} records")
            options["seed"] = seed + start
            for answer in generate(model, tokenizer, prompts[start : start + batch_size], **options):
                before = tokenizer.encode(answer.prompt)  # where a text begins, some tokenizers drop its space
                written = tokenizer.decode(before + answer.ids)[len(tokenizer.decode(before)) :]
                response, cut, _ = written.partition("\ufffd")
                record = {"prompt": answer.prompt, "response": response, "text": answer.prompt + response}
                record |= {"finish_reason": "length" if cut else answer.finish_reason, "seed": answer.seed, **made}
                file.write(json.dumps(record) + "\n")
            file.flush()
    display.progress(f"{records}/{records} records", last=True)
    return len(begun)


def _fingerprint(model: Model, tokenizer: Tokenizer) -> str:
    """Digest of all that decides what a model writes."""
    digest = hashlib.sha256(f"{model.config} {tokenizer.fingerprint} {end_ids(tokenizer)}".encode())
    for value in model.state_dict().values():
        digest.update(value.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def _complete(path: Path) -> tuple[list[dict[str, object]], int]:
    """The records in a file and the bytes of their lines, behind which only a line may stand that a kill cut short."""
    if not path.exists():
        return [], 0
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    begins = b'{"prompt": '
    cut = data[len(whole) :][: len(begins)]
    try:
        found = [json.loads(line) for line in whole.splitlines()]
    except (ValueError, RecursionError):
        found = [None]
    if not all(isinstance(record, dict) for record in found) or not begins.startswith(cut):
        raise ConfigError(f"{path}: holds something else than such records; choose another file")
    return found, len(whole)
