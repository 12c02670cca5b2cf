"""The command line's experiments, in the manner of `cli`: options read, the library called, results printed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from foretoken.cli_common import Json, print_json

lab = typer.Typer(help="The paper's experiments at a size anyone can run.", rich_markup_mode=None)


@lab.callback()
def _group() -> None:
    """The paper's experiments at a size anyone can run."""


@lab.command("list", epilog="Example: foretoken lab list")
def list_experiments(as_json: Json = False) -> None:
    """The experiments by name, and what each asks."""
    from foretoken.display import Display
    from foretoken.lab.experiment import EXPERIMENTS

    print_json({"experiments": EXPERIMENTS}) if as_json else Display().result(
        "\n".join(f"{name:<12} {question}" for name, question in EXPERIMENTS.items())
    )


@lab.command("run", epilog="Example: foretoken lab run star --size cpu --seeds 20")
def run(
    name: Annotated[str, typer.Argument(help="An experiment, or all.")],
    size: Annotated[str, typer.Option(help="smoke (seconds), cpu (minutes to hours) or gpu.")] = "cpu",
    seeds: Annotated[int | None, typer.Option(help="Runs of each arm. Default: the size's.")] = None,
    out: Annotated[
        Path, typer.Option(help="Folder for runs; an experiment's lie in NAME-SIZE below it. What is done there stays.")
    ] = Path("runs/lab"),
    workers: Annotated[
        int | None, typer.Option(help="Runs at a time, each a process. Default: one a core, one for smoke and gpu.")
    ] = None,
    data: Annotated[list[str] | None, typer.Option(help="Text for experiments on text; any number.")] = None,
    split_field: Annotated[str | None, typer.Option(help="Field that says which split a record is of.")] = None,
    as_json: Json = False,
) -> None:
    """Run an experiment, or what is missing of it; prints its tables and its verdict."""
    from foretoken.display import Display
    from foretoken.errors import ConfigError
    from foretoken.lab.experiment import EXPERIMENTS, find, plain, run_experiment, settings_of

    names = list(EXPERIMENTS) if name == "all" else [name]
    at_a_time = workers if workers is not None else (os.cpu_count() or 1) if size == "cpu" else 1
    if at_a_time < 1:
        raise ConfigError(f"workers = {at_a_time} must be at least 1")
    if split_field is not None and not data:
        raise ConfigError(f"--split-field {split_field} is of the records of --data: name them, or leave it out")
    found = {}
    with Display(quiet_text=as_json) as display:
        for each in names:
            experiment = find(each)
            own = name == "all" and "data" not in experiment.sizes["cpu"]  # it makes its data itself
            settings = settings_of(experiment, size, seeds, () if own else data or (), split_field)
            result = run_experiment(experiment, size, settings, out / f"{each}-{size}", at_a_time, display.say)
            found[each] = result["summary"]
            display.result("\n\n".join(table.markdown() for table in experiment.tables(result)))
            display.result(f"\n{result['summary']['verdict']}\nfigures: {out / f'{each}-{size}' / 'result.json'}")
    if as_json:
        print_json(plain(found))


@lab.command("report", epilog="Example: foretoken lab report star --results docs/results")
def report(
    name: Annotated[str | None, typer.Argument(help="An experiment. Default: all that have a result.")] = None,
    runs: Annotated[Path, typer.Option(help="Where `lab run` left its runs.")] = Path("runs/lab"),
    results: Annotated[Path, typer.Option(help="Folder for NAME.md, NAME.svg and NAME.json.")] = Path("docs/results"),
    as_json: Json = False,
) -> None:
    """Write page, figure and JSON of results, from the newest runs or from the JSON that is there."""
    from foretoken.display import Display
    from foretoken.errors import DataError
    from foretoken.lab.experiment import EXPERIMENTS, find, report_experiment

    if name is not None:
        find(name)
    pages = [page for each in ([name] if name else EXPERIMENTS) if (page := report_experiment(each, runs, results))]
    if not pages and name is not None:
        raise DataError(f"no result of {name}: neither in {runs} nor in {results}; foretoken lab run {name} makes one")
    if as_json:
        print_json({"pages": [str(page) for page in pages]})
    else:
        Display().result("\n".join(map(str, pages)) if pages else f"no results in {runs} or {results}")
