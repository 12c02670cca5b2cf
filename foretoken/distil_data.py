"""`foretoken distil-data`: text that a model writes itself, to train heads on what they will have to foresee.

Prompts are beginnings of lines of your text, with what precedes them; record i depends on the checkpoint, the prompt
and seed + i alone, so a file that was interrupted is gone on with.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from foretoken.bench import held_out_prompts
from foretoken.completion import generate
from foretoken.display import Display
from foretoken.errors import ConfigError, DataError
from foretoken.model import Model
from foretoken.tokenizer import Tokenizer


def distil_data(
    model: Model,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    out: str | Path,
    *,
    records: int,
    max_tokens: int,
    temperature: float,
    seed: int,
    batch_size: int,
    display: Display,
) -> int:
    """Append records (prompt, response, text, seed) to the JSON Lines file `out` until it holds so many.

    Returns how many were there before. Raises ConfigError for a file of other options, DataError for texts too short.
    """
    for name, value in (("records", records), ("max_tokens", max_tokens), ("batch_size", batch_size)):
        if value < 1:
            raise ConfigError(f"{name} = {value} must be at least 1")
    if not any(len(text) > 512 for text in texts):
        raise DataError("no text of more than 512 characters to take prompts from")
    path = Path(out)
    prompts = held_out_prompts(texts, records)
    begun, size = _complete(path)
    for index, record in enumerate(begun[:records]):
        if record.get("prompt") != prompts[index] or record.get("seed") != seed + index:
            raise ConfigError(f"{path}: record {index + 1} was made with other options; choose another file")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.truncate(size)  # a line that a kill cut short
        for start in range(len(begun), records, batch_size):
            display.progress(f"{start}/{records} records")
            asked = prompts[start : start + batch_size]
            written = generate(
                model, tokenizer, asked, max_tokens=max_tokens, temperature=temperature, seed=seed + start,
                batch_size=batch_size,
            )  # fmt: skip
            for prompt, generation in zip(asked, written, strict=True):
                record = {"prompt": prompt, "response": generation.text, "text": prompt + generation.text}
                file.write(json.dumps(record | {"seed": generation.seed}) + "\n")
            file.flush()
    display.progress(f"{records}/{records} records", last=True)
    return len(begun)


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
    except ValueError:
        found = [None]
    if not all(isinstance(record, dict) for record in found) or not begins.startswith(cut):
        raise ConfigError(f"{path}: holds something else than such records; choose another file")
    return found, len(whole)
