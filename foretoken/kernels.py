"""`kernels.cpp` as a library: compiled once a machine, its structures and functions as Python calls them.

Where no C++ compiler is found or FORETOKEN_NATIVE=0 is set there is none, and decoding runs in PyTorch.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch

SOURCE = Path(__file__).with_name("kernels.cpp")
FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-std=c++17", "-fopenmp", "-shared", "-fPIC")

_log = logging.getLogger(__name__)


def _structure(name: str, **fields: Any) -> type[ctypes.Structure]:
    pairs = [(field, kind) for kind_names, kind in fields.values() for field in kind_names.split()]
    return type(name, (ctypes.Structure,), {"_fields_": pairs})


INT, REAL, AT = ctypes.c_int64, ctypes.c_double, ctypes.c_void_p
Model = _structure(
    "Model",
    sizes=("bfloat16 packed bytes threads width heads kv_heads head_dim mlp vocabulary", INT),
    eps=("eps", REAL),
    weights=("embedding unembedding draft_unembedding norm cos sin", AT),
)
Layer = _structure(
    "Layer",
    kind=("bytes", INT),
    weights=("qkv qkv_bias o gate_up down norm_1 norm_2 q_norm k_norm hidden_norm keys values", AT),
    capacity=("capacity", INT),
)
Items = _structure("Items", count=("count", INT), arrays=("token row slot position base seen", AT))
Turn = _structure(
    "Turn",
    sizes=("rows tokens drafts ranks rejection draft_vocabulary top_k", INT),
    law=("temperature top_p min_p", REAL),
    arrays=(
        "token length draft_length seed position parent picked path accepted draft logprob proposed proposal state",
        AT,
    ),
)


@functools.cache
def array(kind: Any, count: int) -> Any:
    """The type of `count` numbers side by side, which is as slow to make as any type."""
    return kind * count


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels, from the cache or made now (some seconds); None where that cannot be or is not wanted."""
    if os.environ.get("FORETOKEN_NATIVE") == "0":
        return None
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)
    if compiler is None:
        _log.warning("no C++ compiler (c++, g++ or clang++) found: decoding runs in PyTorch, which is slower")
        return None
    try:
        loaded = ctypes.CDLL(str(_compiled(compiler)))
    except (OSError, subprocess.SubprocessError) as error:
        reason = getattr(error, "stderr", None) or str(error)
        _log.warning("decoding runs in PyTorch, which is slower: %s failed: %s", compiler, reason.strip()[-300:])
        return None
    for name in ("forward", "draft", "logits", "turn", "pack", "pack_bytes"):
        getattr(loaded, f"foretoken_{name}").restype = None
    return loaded


def _compiled(compiler: str) -> Path:
    """Path of the library for this source, compiler and processor."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "foretoken"
    # PyTorch's own OpenMP: two of them in a process would fight for the cores.
    openmp = sorted(str(path) for path in (Path(torch.__file__).parent / "lib").glob("lib[gi]omp*"))
    command = [compiler, *FLAGS, str(SOURCE), *openmp]
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True, timeout=60).stdout
    key = "\n".join([*command, version, _processor()]).encode() + SOURCE.read_bytes()
    path = root / f"kernels-{hashlib.sha256(key).hexdigest()[:32]}.so"
    if not path.exists():
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root) as folder:
            made = Path(folder) / path.name
            subprocess.run([*command, "-o", str(made)], capture_output=True, text=True, check=True, timeout=600)
            made.replace(path)
    return path


def _processor() -> str:
    """What -march=native depends on, so that a home folder shared by different machines is safe."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.platform()
    return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))
