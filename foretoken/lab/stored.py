"""Results of experiments that lie beside them, in words."""

from __future__ import annotations

import json
from importlib import resources


def other_kind(kind: str) -> str:
    """What the other kind of head gave in the stored comparison, `lab/head_kinds.json`; made anew by its command."""
    stored = json.loads((resources.files("foretoken.lab") / "head_kinds.json").read_text(encoding="utf-8"))
    other = "sequential" if kind == "parallel" else "parallel"
    minutes = min(stored["budgets"], key=float)
    arm = "distilled" if other == "sequential" else other  # as the demo trains it
    best = stored["budgets"][minutes][arm]["compiled"]["sampled"]["best"]
    return (
        f"The other kind: in the stored comparison ({minutes} minutes of training, {len(stored['seeds'])} seeds) "
        f"{other} heads gave {best['tokens_per_step']['mean']:.2f} tokens per step at temperature "
        f"{stored['temperature']:g} with {best['way']}, {best['speedup']['mean']:.2f}x as fast as plain "
        f"decoding. Try it: foretoken demo --head-kind {other}"
    )
