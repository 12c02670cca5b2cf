"""Stands in for the drafter in versions of vLLM that it was not tested with: importing it is an error."""

from __future__ import annotations

from vllm import __version__

from foretoken_vllm import OVERRIDE, TESTED

raise ImportError(
    f"foretoken-vllm was tested with vLLM {', '.join(TESTED)} and this is {__version__}: "
    f"install a tested one, or set {OVERRIDE}=1 to try this one"
)
