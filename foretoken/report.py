"""The demo's report.html: one self-contained page with plots, drawn by matplotlib as SVG."""

from __future__ import annotations

import html
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from foretoken.completion import Generation, token_pieces
from foretoken.lab.stored import other_kind
from foretoken.metrics import Record
from foretoken.tokenizer import Tokenizer

COLOURS = ("#f4f4f4", "#b7e4c7", "#a2d2ff", "#e0b1ff", "#ffe08a")
STYLE = """body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}
pre{white-space:pre-wrap;overflow-wrap:anywhere;background:#fafafa;border:1px solid #ddd;padding:.8rem}
td,th{padding:.2rem 1rem .2rem 0;text-align:left}figure{margin:1.5rem 0}.dim{color:#888}"""


def write_report(
    path: Path, records: list[Record], result: dict[str, Any], shown: Sequence[Generation], tokenizer: Tokenizer
) -> None:
    """Write the page from training records, the demo's result and the generations whose text is shown."""
    sampled = result["sampled"]
    rows = [
        ("held-out bits per byte, head 1", f"{result['bits_per_byte']:.3f}", ""),
        ("tokens per step", f"{result['tokens_per_step']:.2f}", f"{sampled['tokens_per_step']:.2f}"),
        ("step cost (plain steps)", f"{result['step_cost']:.2f}", f"{sampled['step_cost']:.2f}"),
        ("drafts per step", f"{result['drafts_per_step']:.2f}", f"{sampled['drafts_per_step']:.2f}"),
        ("speedup", f"{result['speedup']:.2f}", f"{sampled['speedup']:.2f}"),
        ("distinct 8-grams of the text", f"{result['distinct_8grams']:.2f}", f"{sampled['distinct_8grams']:.2f}"),
        ("outputs equal to plain decoding", _yes(result["outputs_equal"]), _yes(sampled["outputs_equal"])),
    ]
    table = "".join(f"<tr><th>{name}</th><td>{a}</td><td>{b}</td></tr>" for name, a, b in rows)
    path.write_text(
        f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>foretoken demo</title><style>{STYLE}</style>
<h1>A model that predicts {result["n_future"]} tokens at a time</h1>
<p>Trained for {result["train_seconds"]:.0f} seconds on the Python standard library; {result["prompts"]} held-out
prompts continued by {result["max_tokens"]} bytes each, plainly and with {_drafts(result["drafts"])}
from {result["head_kind"]} heads.</p>
<p>{html.escape(other_kind(result["head_kind"]))}</p>
<table><tr><th></th><th>greedy</th><th>temperature {sampled["temperature"]:g}</th></tr>{table}</table>
<figure>{_loss_plot(records)}</figure><figure>{_steps_plot(records, result)}</figure>
<figure>{_acceptance_plot(result)}</figure>
<h2>Text at temperature {sampled["temperature"]:g}</h2><p>{_legend(result["n_future"])}</p>
{"".join(_text(tokenizer, generation) for generation in shown)}
<p class="dim">Greedy text of a small model falls into loops, which any drafter predicts: read greedy figures beside
the share of distinct 8-grams.</p></html>
""",
        encoding="utf-8",
    )


def _drafts(count: int | None) -> str:
    return "as many drafts a step as pay" if count is None else f"{count} drafts a step"


def _yes(value: bool) -> str:
    return "yes, all prompts" if value else "NO"


def _loss_plot(records: list[Record]) -> str:
    figure, axes = _axes("Bits per byte of each head while training", "minutes", "bits per byte")
    training = [record for record in records if record["kind"] == "train"]
    minutes = [record["seconds"] / 60 for record in training]
    for head in range(len(training[0]["bits_per_byte"])):
        axes.plot(
            minutes, [record["bits_per_byte"][head] for record in training], label=f"head {head + 1}: t+{head + 1}"
        )
    axes.legend()
    return _svg(figure)


def _steps_plot(records: list[Record], result: dict[str, Any]) -> str:
    figure, axes = _axes("Predicted tokens per step while training", "step", "tokens per step")
    for kind, style in (("train", "-"), ("validation", "o")):
        some = [record for record in records if record["kind"] == kind]
        values = [record["predicted_tokens_per_step"] for record in some]
        axes.plot([record["step"] for record in some], values, style, label=f"{kind} text")
    axes.axhline(result["sampled"]["tokens_per_step"], linestyle=":", color="grey", label="decoding, sampled")
    axes.legend()
    return _svg(figure)


def _acceptance_plot(result: dict[str, Any]) -> str:
    figure, axes = _axes("Share of steps in which drafts are accepted up to a position", "drafted position", "share")
    greedy, sampled = result["accepted_by_position"], result["sampled"]["accepted_by_position"]
    for offset, (values, label) in enumerate(((greedy, "greedy"), (sampled, "sampled"))):
        axes.bar([k + 1 + 0.4 * offset - 0.2 for k in range(len(values))], values, width=0.38, label=label)
    axes.set_xticks([k + 1 for k in range(len(greedy))])
    axes.set_ylim(0, 1)
    axes.legend()
    return _svg(figure)


def _axes(title: str, x: str, y: str) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.4), layout="tight")
    axes = figure.add_subplot()
    axes.set(title=title, xlabel=x, ylabel=y)
    axes.grid(alpha=0.3)
    return figure, axes


def _svg(figure: Any) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    return buffer.getvalue().partition("<svg")[1] + buffer.getvalue().partition("<svg")[2]


def _legend(n: int) -> str:
    spans = (f'<span style="background:{COLOURS[i % len(COLOURS)]}"> head {i + 1} </span>' for i in range(n))
    return "Each token by the head that drafted it: " + " ".join(spans)


def _text(tokenizer: Tokenizer, generation: Generation) -> str:
    spans = "".join(
        f'<span style="background:{COLOURS[(head - 1) % len(COLOURS)]}">{html.escape(piece)}</span>'
        for piece, head in zip(token_pieces(tokenizer, generation), generation.sources, strict=True)
    )
    return f'<pre><span class="dim">{html.escape(generation.prompt)}</span>{spans}</pre>'
