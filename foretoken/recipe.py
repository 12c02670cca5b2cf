"""Recipes: TOML files with dotted overrides, by path or by the name of a shipped one."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from foretoken.config import Recipe, validated
from foretoken.errors import ConfigError

RECIPES = Path(__file__).with_name("recipes")


def load_recipe(name_or_path: str, overrides: tuple[str, ...] = ()) -> Recipe:
    """A recipe from a TOML file, or by the name of a shipped one, with overrides like `train.steps=100` applied.

    Raises ConfigError for a file that is missing or not TOML, an unknown key, or a value that breaks a rule.
    """
    values = _read_toml(name_or_path)
    for override in overrides:
        _apply_override(values, override)
    return validated(Recipe, values, f"recipe {name_or_path}")


def shipped_recipes() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(path.stem for path in RECIPES.glob("*.toml"))


def _read_toml(name_or_path: str) -> dict[str, Any]:
    path = Path(name_or_path)
    try:
        if not path.is_file():
            if name_or_path not in shipped_recipes():
                names = ", ".join(shipped_recipes())
                raise ConfigError(f"no recipe '{name_or_path}': neither a file nor one of the shipped {names}")
            path = RECIPES / f"{name_or_path}.toml"
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"recipe {name_or_path}: not TOML: {error}") from None
    except OSError as error:
        raise ConfigError(f"recipe {name_or_path}: {error.strerror}") from None


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or len(parts) < 2:
        raise ConfigError(f"override '{override}': write section.key=value, for example train.steps=100")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()  # a bare word is a string
    section = values
    for part in parts[:-1]:
        section = section.setdefault(part, {})
        if not isinstance(section, dict):
            raise ConfigError(f"override '{override}': '{part}' is not a section")
    section[parts[-1]] = value
    if parts[0] == "model" and parts[-1] == "num_hidden_layers":
        values["model"].pop("total_blocks", None)
    if parts[0] == "model" and parts[-1] == "total_blocks":
        values["model"].pop("num_hidden_layers", None)
