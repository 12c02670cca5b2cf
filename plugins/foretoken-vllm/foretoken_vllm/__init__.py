"""vLLM plugin: makes `mtp_heads/` of a checkpoint with parallel heads a drafter that vLLM can run.

vLLM calls `register` in each of its processes. It only names a class, so a server of some other model does not notice.
"""

from __future__ import annotations

import os

ARCHITECTURE = "MtpHeadsEagle3"  # as mtp_heads/config.json names it
TESTED = ("0.32.0",)  # the drafter leans on vLLM's internals, which change without notice
OVERRIDE = "FORETOKEN_VLLM_UNTESTED"


def register() -> None:
    """Entry point of the group `vllm.general_plugins`."""
    from vllm import ModelRegistry, __version__

    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        module = "model" if is_tested(__version__) else "untested"
        ModelRegistry.register_model(ARCHITECTURE, f"{__name__}.{module}:{ARCHITECTURE}")


def is_tested(version: str) -> bool:
    """Whether the drafter may run in this version of vLLM: tested, or tried at the user's wish."""
    return version.partition("+")[0] in TESTED or os.environ.get(OVERRIDE) == "1"
