"""The README's and the docs' commands and code run as they stand, on a small model in the place of the demo's."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path

import pytest

from foretoken import cli

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# These train for minutes, or need a corpus of the reader's: their options are checked in test_cli.py.
LONG = (
    "foretoken demo",
    "foretoken bench decode --size",
    "foretoken bench train",
    "foretoken train demo",
    "foretoken train retrofit",
    "foretoken train my-recipe.toml",
    "foretoken train-tokenizer",
)


def fenced(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)


def commands() -> list[str]:
    lines = [line for page in PAGES for line in page.read_text(encoding="utf-8").splitlines()]
    shown = [match.group(1) for line in lines if (match := re.match(r"(?:    |\$ )(foretoken [a-z].*)", line))]
    return list(dict.fromkeys(command.partition(" # ")[0].strip() for command in shown))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory in which runs/demo is a small trained model."""
    where = tmp_path_factory.mktemp("readme")
    (where / "text").mkdir()
    for i in range(25):
        (where / "text" / f"{i}.py").write_text(f"def read_{i}(path):\n    return open(path).read()\n" * 12)
    run(
        f"foretoken train tiny --out {where}/runs/demo --set data.source='[\"{where}/text\"]' "
        f"--set data.cache_dir={where}/cache --set train.seq_len=256 --set train.steps=10"
    )
    return where


def run(command: str) -> None:
    before = sys.argv
    sys.argv = shlex.split(command, comments=True)
    try:
        with pytest.raises(SystemExit) as ended:
            cli.main()
    finally:
        sys.argv = before
    assert ended.value.code == 0, command


@pytest.mark.parametrize("command", [c for c in commands() if not c.startswith(LONG)])
def test_command(command: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    run(command)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_code(page: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    for code in fenced(page, "python"):
        exec(compile(code, str(page), "exec"), {})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_files_exist(page: Path) -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_readme_has_the_commands() -> None:
    found = commands()
    assert any(c.startswith("foretoken generate") for c in found)
    assert any(c.startswith("foretoken evaluate") for c in found)


def test_recipes_in_the_docs_are_valid() -> None:
    import tomllib

    from foretoken.config import Recipe

    for code in fenced(ROOT / "docs" / "training.md", "toml"):
        Recipe.model_validate(tomllib.loads(code))


def test_readme_figures_are_the_stored_ones() -> None:
    """The figures in the README are those of the result JSON that it names."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in ("demo.json", "demo-256x16.json"):
        stored = json.loads((ROOT / "docs" / "results" / name).read_text(encoding="utf-8"))
        assert f"docs/results/{name}" in text
        for figures in (stored, stored["sampled"]):
            assert f"{figures['tokens_per_step']:.2f} tokens per step" in text
            assert f"{figures['speedup']:.2f}x" in text
        assert f"{stored['bits_per_byte']:.2f} bits per byte" in text
