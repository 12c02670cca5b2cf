"""What the experiments share: runs of arms and seeds, side by side and resumed, their figures together, and a page.

1. An experiment is a file beside this one that defines EXPERIMENT; its line in EXPERIMENTS makes it known.
2. A run is one arm with one seed in a folder of its own. Its figures are kept there as run.json, so what is finished is
   never done again; a run that was stopped goes on from what it saved.
3. Runs go side by side in worker processes. What is timed is measured after them, one run after the other.
4. `result` puts the figures of all runs beside each other in one JSON; `page` makes of it, and of nothing else, the
   Markdown and the figure.
"""

from __future__ import annotations

import importlib
import json
import math
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from foretoken import __version__
from foretoken.bench_decode import machine
from foretoken.errors import ConfigError
from foretoken.files import read_json, write_json
from foretoken.lab.intervals import Table

EXPERIMENTS = {
    "star": "do further heads find the path in a star graph, where the next token alone teaches a guess?",
    "heads": "which kind of heads drafts best, and what does each cost the next-token loss?",
    "horizon": "how many heads: bits per byte, tokens per step and step cost by n at equal total blocks",
    "nth-token": "what does a trunk learn from the k-th next token alone?",
    "information": "entropies of the next two tokens, and how much the loss of n heads weighs choice points",
    "sampling": "how many drafts three rules accept, by temperature",
    "induction": "the second token of a name after its first mention, n = 1 and 2",
    "arithmetic": "polynomials over F7[X]/(X^5) in and out of the trained length, n = 1, 2 and 4",
}
SIZES = ("smoke", "cpu", "gpu")

Figures = dict[str, Any]
Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Run:
    """One arm with one seed: what to do, as JSON values, and where. device: cpu or cuda."""

    arm: str
    seed: int
    settings: Settings
    folder: Path
    device: str = "cpu"
    report: Callable[[str], None] = field(default=lambda text: None, compare=False)


@dataclass(frozen=True)
class Experiment:
    """A question with what answers it.

    sizes: by name the settings, JSON values; all have `arms` (names) and `seeds` (how many), and may have `most_seeds`
    of some arms. run: a run's figures, as JSON values; it may be called again where it was stopped. measure: further
    figures, timed with nothing beside them. prepare: what must be there before the runs, in their common folder.
    summarise: from the result the figures that the page shows, and the verdict by `rule`. tables: of the result, with
    the paper's numbers beside ours. draw: the figure, with matplotlib's axes. arms: their names, where they depend on
    settings such as the data. notes: what was chosen, for the page.
    """

    name: str
    rule: str
    sizes: Mapping[str, Settings]
    run: Callable[[Run], Figures]
    summarise: Callable[[Figures], Figures]
    tables: Callable[[Figures], list[Table]]
    draw: Callable[[Figures, Any], None]
    notes: str
    intervals: str
    prepare: Callable[[Settings, Path, str], None] | None = None
    measure: Callable[[Run], Figures] | None = None
    arms: Callable[[Settings], list[str]] | None = None


def find(name: str) -> Experiment:
    """The experiment of a name. Raises ConfigError where there is none."""
    if name not in EXPERIMENTS:
        raise ConfigError(f"no experiment '{name}': there are {', '.join(EXPERIMENTS)}")
    found: Experiment = importlib.import_module(f"foretoken.lab.{name.replace('-', '_')}").EXPERIMENT
    return found


def settings_of(
    experiment: Experiment, size: str, seeds: int | None, data: Sequence[str] = (), split_field: str | None = None
) -> dict[str, Any]:
    """What a size says, with another number of seeds or other sources of text. Raises ConfigError."""
    if size not in SIZES:
        raise ConfigError(f"size {size}: must be one of {', '.join(SIZES)}")
    settings = dict(experiment.sizes[size])
    if seeds is not None:
        if seeds < 1:
            raise ConfigError(f"seeds = {seeds} must be at least 1")
        settings["seeds"] = seeds
    if data:
        if "data" not in settings:
            raise ConfigError(f"the experiment {experiment.name} makes its own data: leave --data out")
        settings |= {"data": list(data), "split_field": split_field}
    if experiment.arms is not None:
        settings["arms"] = experiment.arms(settings)
    return settings


def run_experiment(
    experiment: Experiment, size: str, settings: dict[str, Any], out: Path, workers: int, report: Callable[[str], None]
) -> Figures:
    """Do what is missing in the folder `out`; the result, which is also in `out`/result.json.

    Raises ConfigError where `out` holds runs of other settings, or a size needs a GPU that is not there.
    """
    device = "cuda" if size == "gpu" else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"{experiment.name}: the size gpu needs a GPU, which is not here; use --size cpu")
    _check_settings(settings, out)
    if experiment.prepare is not None:
        experiment.prepare(settings, out, device)
    runs = [
        Run(arm, seed, settings, out / f"{arm}-seed{seed}", device, report)
        for seed in range(settings["seeds"])
        for arm in settings["arms"]
        if seed < settings.get("most_seeds", {}).get(arm, settings["seeds"])
    ]
    missing = [run for run in runs if not (run.folder / "run.json").exists()]
    for done, run in enumerate(_done(experiment, missing, workers), len(runs) - len(missing) + 1):
        report(f"{experiment.name}: {run.arm}, seed {run.seed} ({done} of {len(runs)} runs)")
    for run in runs if experiment.measure is not None else ():
        if not (run.folder / "measured.json").exists():
            report(f"{experiment.name}: measuring {run.arm}, seed {run.seed}")
            write_json(run.folder / "measured.json", plain(experiment.measure(run)))  # type: ignore[misc]
    found = result(experiment, size, settings, runs)
    write_json(out / "result.json", plain(found))
    return found


def _check_settings(settings: dict[str, Any], out: Path) -> None:
    """Runs in a folder are of the same settings, but for how many seeds there are."""
    path = out / "settings.json"
    if path.exists():
        before = read_json(path)
        differing = [key for key in {**settings, **before} if key != "seeds" and settings.get(key) != before.get(key)]
        if differing:
            raise ConfigError(
                f"{out}: holds runs with another {', '.join(sorted(differing))}; choose another --out, or remove it"
            )
    out.mkdir(parents=True, exist_ok=True)
    write_json(path, settings)


def _done(experiment: Experiment, runs: Sequence[Run], workers: int) -> Iterator[Run]:
    """Do runs, in this process or in several, and give them as they end."""
    if workers == 1 or len(runs) < 2:
        for run in runs:
            _run_one(experiment, run)
            yield run
        return
    threads = max(1, (os.cpu_count() or 1) // workers)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=spawn, initializer=_begin_worker, initargs=(threads,)) as pool:
        # Progress is the parent's: what a worker reports has nowhere to go.
        tasks = {
            pool.submit(_run_named, experiment.name, run.arm, run.seed, dict(run.settings), run.folder, run.device): run
            for run in runs
        }
        try:
            for task in as_completed(tasks):
                task.result()
                yield tasks[task]
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _begin_worker(threads: int) -> None:
    torch.set_num_threads(threads)
    parent = os.getppid()

    def leave_with_parent() -> None:  # one that is killed cannot tell
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=leave_with_parent, daemon=True).start()


def _run_named(name: str, arm: str, seed: int, settings: Settings, folder: Path, device: str) -> None:
    _run_one(find(name), Run(arm, seed, settings, folder, device))


def _run_one(experiment: Experiment, run: Run) -> None:
    run.folder.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    figures = experiment.run(run)
    seconds = time.perf_counter() - began  # of the last part of a run that was stopped
    partial = run.folder / "run.json.partial"
    write_json(partial, plain({**figures, "seconds": seconds}))
    partial.rename(run.folder / "run.json")


def result(experiment: Experiment, size: str, settings: Settings, runs: Sequence[Run]) -> Figures:
    """All figures of runs that are done, by arm and in the order of the seeds, and what they come to."""
    by_arm: dict[str, list[Figures]] = {arm: [] for arm in settings["arms"]}
    for run in runs:
        figures = read_json(run.folder / "run.json")
        measured = run.folder / "measured.json"
        by_arm[run.arm].append({"seed": run.seed, **figures, **(read_json(measured) if measured.exists() else {})})
    given = settings.get("data", []) if settings.get("data") != ["stdlib"] else []
    data = "".join(f" --data {Path(source).name}" for source in given)
    data += f" --split-field {settings['split_field']}" if settings.get("split_field") else ""
    found: Figures = {
        "experiment": experiment.name,
        "size": size,
        "command": f"foretoken lab run {experiment.name} --size {size} --seeds {settings['seeds']}{data}",
        "machine": machine(),
        "versions": {"foretoken": __version__, "torch": torch.__version__},
        "settings": dict(settings),
        "runs": by_arm,
    }
    return with_summary(found, experiment)


def with_summary(found: Figures, experiment: Experiment | None = None) -> Figures:
    """A result with its summary made anew: read from JSON, that has no intervals to calculate with."""
    experiment = experiment or find(found["experiment"])
    return {**found, "summary": experiment.summarise(found)}


def plain(value: Any) -> Any:
    """JSON values that any reader takes: null for what is no number, such as the interval of a single run."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def page(found: Figures) -> str:
    """The Markdown of a result, its summary made anew; its figure is named after the experiment."""
    experiment, found = find(found["experiment"]), with_summary(found)
    name, settings, where = experiment.name, found["settings"], found["machine"]
    seconds = [run["seconds"] for runs in found["runs"].values() for run in runs]
    runs = f"{len(seconds)} runs, {sum(seconds) / 60:.0f} minutes in them all ({max(seconds):.0f} s the longest)"
    hardware = ", ".join([str(where["cpu"]), *([where["gpu"]] if where["gpu"] else []), f"{where['threads']} threads"])
    shown = "; ".join(f"{key} {json.dumps(value)}" for key, value in settings.items() if key not in ("arms", "seeds"))
    parts = [
        f"# {name}\n\n{EXPERIMENTS[name][0].upper()}{EXPERIMENTS[name][1:]}",
        f"**Verdict.** {found['summary']['verdict']}",
        f"By the rule: {experiment.rule}",
        f"![{name}]({name}.svg)",
        *(table.markdown() for table in experiment.tables(found)),
        experiment.intervals,
        f"## How\n\n{experiment.notes}",
        f"```text\n{found['command']}\nforetoken lab report {name}\n```",
        f"Size {found['size']}, {settings['seeds']} seeds; {runs}. {hardware}; torch {found['versions']['torch']}. "
        f"Settings: {shown}.",
    ]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def draw(found: Figures, path: Path) -> None:
    """The figure of a result as an SVG, the same bytes for the same result. Needs the extra `demo`."""
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("figures need matplotlib: pip install 'foretoken[demo]'") from None
    with mpl.rc_context({"svg.hashsalt": "foretoken", "font.size": 9}):
        figure = Figure(figsize=(7, 3.6), layout="tight")
        axes = figure.add_subplot()
        axes.grid(alpha=0.3)
        find(found["experiment"]).draw(found, axes)
        figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})


def report_experiment(name: str, runs: Path, results: Path) -> Path | None:
    """Write an experiment's page, figure and JSON into `results`, from the newest result below `runs`.

    Where no run has ended, from the JSON that lies in `results`; None where there is neither. Of sizes, gpu goes
    before cpu before smoke.
    """
    found = [path for size in reversed(SIZES) if (path := runs / f"{name}-{size}" / "result.json").exists()]
    stored = results / f"{name}.json"
    if not found and not stored.exists():
        return None
    values = read_json(found[0] if found else stored)
    results.mkdir(parents=True, exist_ok=True)
    write_json(stored, plain(with_summary(values)))
    target = results / f"{name}.md"
    target.write_text(page(values), encoding="utf-8")
    draw(values, results / f"{name}.svg")
    return target
