"""The package as a whole: it imports, in one direction; its names, recipes and sizes are what they are said to be."""

from __future__ import annotations

import ast
import importlib
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import foretoken
from foretoken.config import ModelConfig
from foretoken.formats import hf
from foretoken.model import Model
from foretoken.recipe import load_recipe, shipped_recipes

ROOT = Path(__file__).parents[1]
PACKAGE = Path(foretoken.__file__).parent

# A module imports only from those above it; the formats a checkpoint is made of only from errors and config.
ORDER = [
    "errors",
    "config_model",
    "config",
    "recipe",
    "files",
    "tokenizer",
    "chat",
    "sources",
    "framing",
    "data",
    "windows",
    "cache",
    "sampling",
    "packing",
    "layers",
    "stack",
    "unrolled",
    "heads",
    "tree",
    "gpu",
    "graphs",
    "kernels",
    "native",
    "pace",
    "processors",
    "grammar",
    "model",
    "loss",
    "distil",
    "parallel",
    "lora",
    "optim",
    "formats.safetensors",
    "formats.hf",
    "provenance",
    "train_state",
    "checkpoint",
    "retrofit",
    "attach",
    "formats.trained",
    "formats.eagle3",
    "formats.gguf_tokenizer",
    "formats.gguf",
    "formats.importing",
    "formats.sentencepiece",
    "formats.meta",
    "formats.fast_llm",
    "formats.modeling_foretoken",
    "formats.hf_class",
    "formats.engines",
    "request",
    "draft",
    "draft_heads",
    "drafters",
    "decode",
    "completion",
    "evaluate",
    "metrics",
    "run_folder",
    "saver",
    "failure",
    "train",
    "display",
    "bench",
    "bench_peers",
    "bench_cases",
    "bench_decode",
    "bench_train",
    "lab.stored",
    "report",
    "distil_data",
    "demo",
    "lab.head_kinds",
    "lab.acceptance",
    "lab.draft_vocab",
    "lab.retrofit",
    "lab.intervals",
    "lab.experiment",
    "lab.fit",
    "lab.text",
    "lab.star",
    "lab.heads",
    "lab.horizon",
    "lab.nth_token",
    "lab.information",
    "lab.sampling",
    "lab.story",
    "lab.induction",
    "lab.arithmetic",
    "cli_common",
    "bench_cli",
    "cli_export",
    "cli_generate",
    "cli_import",
    "lab.cli",
    "cli",
    "__main__",
]
LINES, FUNCTION_LINES = 350, 60


def modules() -> dict[str, Path]:
    """Every module below foretoken by its name, as in 'formats.hf'; packages themselves end in '__init__'."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        found[".".join(path.relative_to(PACKAGE).with_suffix("").parts)] = path
    return found


def imported(tree: ast.AST) -> Iterator[str]:
    """Our modules that a module imports, also inside functions and for type checking."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            if node.module == "foretoken" or (node.module or "").startswith("foretoken."):
                prefix = (node.module or "").removeprefix("foretoken").removeprefix(".")
                for alias in node.names:
                    name = f"{prefix}.{alias.name}".removeprefix(".")
                    yield name if name in modules() else prefix
        elif isinstance(node, ast.Import):
            yield from (alias.name.removeprefix("foretoken.") for alias in node.names if "foretoken" in alias.name)


@pytest.mark.parametrize("name", modules())
def test_imports(name: str) -> None:
    if name == "gpu":
        pytest.importorskip("triton")
    module = importlib.import_module(f"foretoken.{name}".removesuffix(".__init__"))
    assert module.__doc__, "a module says what it is"


@pytest.mark.parametrize("name", [name for name in modules() if not name.endswith("__init__")])
def test_imports_go_one_way(name: str) -> None:
    assert name in ORDER, "a new module has a place in ORDER"
    for other in imported(ast.parse(modules()[name].read_text(encoding="utf-8"))):
        if other == "":  # the package's own names: only its version
            continue
        assert ORDER.index(other) < ORDER.index(name), f"{name} imports {other}"
        if name in ("formats.hf", "formats.safetensors"):
            assert other in ("errors", "config_model", "config"), f"{name} imports {other}"


def test_the_package_is_used_for_its_version_alone() -> None:
    for name, path in modules().items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module == "foretoken":
                own = {alias.name for alias in node.names if alias.name not in modules()}
                assert own <= {"__version__"}, name


# Public names.


def test_public_names() -> None:
    assert foretoken.__all__ == sorted(foretoken.__all__)
    assert sorted(foretoken._PUBLIC) == foretoken.__all__
    assert set(dir(foretoken)) == {*foretoken.__all__, "__version__"}
    for name in foretoken.__all__:
        assert getattr(foretoken, name).__doc__, name
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        foretoken.nothing  # noqa: B018


def test_type_checkers_see_the_same_names() -> None:
    """The imports under TYPE_CHECKING are the table that `__getattr__` reads."""
    seen = {}
    for node in ast.walk(ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("foretoken."):
            for alias in node.names:
                where = (node.module or "").removeprefix("foretoken.")
                seen[alias.asname or alias.name] = f"{where}:{alias.name}" if alias.asname else where
    assert seen == foretoken._PUBLIC


def public_names() -> set[str]:
    """`module.name` of the page on the Python API, and of what `foretoken` itself names."""
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    listed = {
        name
        for line in page.splitlines()
        if line.startswith("| `")
        for name in re.findall(r"`([^`]+)`", line.split("|")[1])
    }
    own = {name for name in listed if "." not in name}
    assert own == set(foretoken.__all__)
    where = {at.replace(":", ".") if ":" in at else f"{at}.{name}" for name, at in foretoken._PUBLIC.items()}
    return (listed - own) | where


def test_the_api_page_names_what_there_is() -> None:
    for name in sorted(public_names()):
        module, _, attribute = name.rpartition(".")
        found = getattr(importlib.import_module(f"foretoken.{module}"), attribute)
        assert found.__doc__ or isinstance(found, (int, float, str)), name


def test_experiments_are_built_on_public_names() -> None:
    public = public_names()
    for name, path in modules().items():
        if not name.startswith("lab.") or name == "lab.cli":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith("foretoken"):
                continue
            for alias in node.names:
                used = f"{node.module}.{alias.name}".removeprefix("foretoken.")
                assert used in public or used.startswith("lab.") or used in ("__version__", "optim"), f"{name}: {used}"


def test_readme_uses_public_names() -> None:
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for name in re.findall(r"\bforetoken\.([A-Za-z_]+)\b(?!\.(?:json|md|toml))", page.read_text(encoding="utf-8")):
            if name not in ("json", "lab", *modules()):
                assert name in foretoken.__all__ or name == "__version__", f"{page.name}: foretoken.{name}"


def test_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["project"]["dynamic"] == ["version"]
    assert project["tool"]["hatch"]["version"]["path"] == "foretoken/__init__.py"
    assert re.fullmatch(r"\d+\.\d+\.\d+", foretoken.__version__)
    assert f"## {foretoken.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert (PACKAGE / "py.typed").exists()


# Recipes: the paper's table S14, with dimension, total blocks, attention heads; and n of the experiments.

PAPER = {
    "1m": (128, 5, 4, 2), "3m": (256, 4, 8, 2), "10m": (384, 6, 8, 2), "30m": (512, 10, 8, 2),
    "100m": (768, 14, 12, 2), "300m": (1024, 25, 16, 2), "1b": (1536, 36, 24, 2),
    "0.3b": (1024, 18, 16, 4), "0.6b": (1280, 27, 20, 4), "1.3b": (2048, 24, 16, 4), "3b": (2560, 36, 20, 4),
    "6.7b": (4096, 32, 32, 4), "13b": (5120, 40, 40, 4),
}  # fmt: skip


def shape(name: str) -> ModelConfig:
    recipe = load_recipe(name)
    return recipe.model.resolve(260 if recipe.tokenizer.kind == "bytes" else 32_000, recipe.train.seq_len)


def test_shipped_recipes() -> None:
    assert shipped_recipes() == sorted(["demo", "retrofit", "tiny", *(f"paper-{name}" for name in PAPER)])
    for name in set(shipped_recipes()) - {"retrofit"}:
        config = shape(name)
        # what every engine loads: an untied Llama without biases
        assert (config.architecture, config.tie_word_embeddings, config.head_kind) == ("llama", False, "parallel")
        assert config.hidden_size == config.head_dim * config.num_attention_heads


@pytest.mark.parametrize("name", PAPER)
def test_recipes_of_the_paper(name: str) -> None:
    """12 d^2 per block gives the first seven their names, embedding and unembedding of 32000 more the others."""
    width, blocks, heads, n = PAPER[name]
    config = shape(f"paper-{name}")
    assert (config.hidden_size, config.num_attention_heads, config.n_future) == (width, heads, n)
    assert config.num_hidden_layers + config.n_future - 1 == blocks
    with torch.device("meta"):
        model = Model(config)
    counts = {key: p.numel() for key, p in model.named_parameters()}
    in_blocks = sum(count for key, count in counts.items() if key.startswith(("trunk.", "heads.")))
    assert in_blocks == pytest.approx(12 * width**2 * blocks, rel=0.1)  # the SwiGLU width is rounded up to 64
    nominal = float(name[:-1]) * {"m": 1e6, "b": 1e9}[name[-1]]
    whole = in_blocks if n == 2 else sum(counts.values())
    assert whole == pytest.approx(nominal, rel=0.15)


def test_fewer_futures_at_equal_parameters() -> None:
    """The paper's comparison: blocks move from the heads to the trunk, the total stays."""
    counts = []
    for n in (1, 2, 4):
        recipe = load_recipe("paper-0.3b", (f"model.n_future={n}",))
        with torch.device("meta"):
            counts.append(sum(p.numel() for p in Model(recipe.model.resolve(32_000, 4096)).parameters()))
    assert len(set(counts)) == 1


def test_names_of_every_format_are_distinct() -> None:
    for architecture in ("llama", "qwen2", "qwen3"):
        config = shape("tiny").model_copy(update={"architecture": architecture})
        with torch.device("meta"):
            names = [name for name, _ in Model(config).named_parameters()]
        main = [new for name in names if (new := hf.main_name(name, config))]
        beside = [new for name in names if (new := hf.heads_name(name, config))]
        assert len(set(main)) == len(main)
        assert len(set(beside)) == len(beside)
        assert len(main) + len(beside) == len(names) + 1, "each parameter is stored once, the final norm twice"


# Sizes.


@pytest.mark.parametrize("name", modules())
def test_files_and_functions_are_small(name: str) -> None:
    text = modules()[name].read_text(encoding="utf-8")
    assert len(text.splitlines()) <= LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert (node.end_lineno or 0) - node.lineno < FUNCTION_LINES, node.name


def test_the_core_reads_in_an_afternoon() -> None:
    beside = ("formats", "lab", "bench")
    core = [path for name, path in modules().items() if not name.startswith(beside)]
    code = sum(
        1
        for path in core
        for line in path.read_text(encoding="utf-8").splitlines()
        if line.strip() and not line.strip().startswith("#")
    )
    assert code < 8600
