"""Heads 2..n of a checkpoint as one draft model for vLLM's EAGLE-3 proposer.

The proposer calls the drafter on all tokens of a step, takes the first draft, and hands what the call fed back to the
next call, on one token per sequence, for the next draft. Our heads need no such chain: head j at position t drafts
token t + j from the trunk's output at t. So the first call runs all heads, the state it feeds back carries the outputs
of all of them side by side, and each later call hands out the next one.

M = n - 1 heads, H width of the model, T tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.models.llama import LlamaDecoderLayer, LlamaModel
from vllm.model_executor.models.llama_eagle3 import Eagle3LlamaForCausalLM
from vllm.model_executor.models.mistral import MistralDecoderLayer
from vllm.model_executor.models.qwen2 import Qwen2DecoderLayer
from vllm.model_executor.models.qwen3 import Qwen3DecoderLayer
from vllm.model_executor.models.utils import AutoWeightsLoader, get_draft_quant_config
from vllm.platforms import current_platform

from foretoken_vllm import ARCHITECTURE

logger = init_logger(f"vllm.{__name__}")  # below vllm's logger, which has the handler
FUSED = {".qkv_proj.": (".q_proj.", ".k_proj.", ".v_proj."), ".gate_up_proj.": (".gate_proj.", ".up_proj.")}


class OwnQuantisation:
    """Layers are quantised as mtp_heads/ is, which is not at all, and not as the model is."""

    def get_quant_config(self, vllm_config: VllmConfig) -> Any:
        """The drafter's, where vLLM's layers ask for the model's."""
        return get_draft_quant_config(vllm_config)


class LlamaHead(OwnQuantisation, LlamaDecoderLayer):
    """A head of a Llama."""


class MistralHead(OwnQuantisation, MistralDecoderLayer):
    """A head of a Mistral."""


def make_head(vllm_config: VllmConfig, target: Any, prefix: str) -> nn.Module:
    """A layer of the kind that the target (its Hugging Face config) consists of."""
    architecture = (target.architectures or ["none"])[0]
    if architecture == "LlamaForCausalLM":
        return LlamaHead(vllm_config, prefix=prefix, config=target)
    if architecture == "MistralForCausalLM":
        return MistralHead(vllm_config, prefix=prefix, config=target)
    kinds = {"Qwen2ForCausalLM": Qwen2DecoderLayer, "Qwen3ForCausalLM": Qwen3DecoderLayer}
    if architecture not in kinds:
        raise ValueError(f"foretoken-vllm: heads of a {architecture}; supported are Llama, Mistral, Qwen2 and Qwen3")
    return kinds[architecture](
        config=target,
        cache_config=vllm_config.cache_config,
        quant_config=get_draft_quant_config(vllm_config),
        prefix=prefix,
    )


@support_torch_compile(dynamic_arg_dims={"input_ids": 0, "positions": -1, "hidden_states": 0, "inputs_embeds": 0})
class Heads(nn.Module):
    """All heads and the final norm."""

    embed_tokens: nn.Module

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        target, draft = _checked(vllm_config)
        layers = vllm_config.model_config.get_total_num_hidden_layers()
        target = copy.copy(target)
        target.target_layer_count = layers  # from which vLLM's layers count themselves into `layer_types`
        self.width: int = target.hidden_size
        # vLLM finds each layer's cache by this name, so the count goes on where the target's layers end.
        self.heads = nn.ModuleList(
            make_head(vllm_config, target, f"model.layers.{layers + i}") for i in range(draft.num_hidden_layers)
        )
        self.norm = RMSNorm(self.width, eps=target.rms_norm_eps)
        # The proposer puts the target's embedding in this place, where the widths agree; the heads do not read it.
        self.embed_tokens = nn.Module()
        self.embed_tokens.register_buffer("weight", torch.empty(0, self.width), persistent=False)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        hidden_states: Tensor,
        inputs_embeds: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The next draft's hidden state (T, H), and the further ones' (T, M H) to be handed to the next call.

        hidden_states (T, M H): the trunk's output and zeros in the first call of a step; in later calls what the last
        one returned. Which of the two a row is stands in the row itself, so that one graph serves both.
        """
        width, outputs = self.width, []
        for head in self.heads:
            x, residual = head(positions, hidden_states[:, :width].clone(), None)
            outputs.append(self.norm(x, residual)[0])
        drafts = torch.cat(outputs, -1)
        if len(self.heads) > 1:
            is_first_call = (hidden_states[:, width : 2 * width] == 0).all(-1, keepdim=True)
            drafts = torch.where(is_first_call, drafts, hidden_states)
        return drafts[:, :width], drafts.roll(-width, -1)


class MtpHeadsEagle3(Eagle3LlamaForCausalLM):  # vLLM's proposer demands this class or one of three others
    """The drafter that mtp_heads/config.json names. Embedding and unembedding are the target's, set by the proposer."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        nn.Module.__init__(self)
        self.config = vllm_config.speculative_config.draft_model_config.hf_config
        self.model = Heads(vllm_config=vllm_config, prefix=f"{prefix}.model" if prefix else "model")
        self.logits_processor = LogitsProcessor(self.config.vocab_size)
        if current_platform.is_cpu():
            logger.warning_once(
                "foretoken-vllm: on a CPU, vLLM samples wrongly when it speculates, whatever drafts: temperature, "
                "top-p and top-k of drafted tokens are uninitialised memory. Use temperature 0, or no speculation."
            )

    def embed_input_ids(self, input_ids: Tensor, *_: Any, **__: Any) -> Tensor:
        """Embeddings of the target (T, H); for the proposer's interface, the heads do not read them."""
        return self.model.embed_tokens(input_ids)

    def combine_hidden_states(self, hidden_states: Tensor) -> Tensor:
        """The trunk's output (T, H) in the width of all heads: (T, M H), zeros behind it."""
        return nn.functional.pad(hidden_states, (0, self.config.hidden_size - hidden_states.shape[-1]))

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        hidden_states: Tensor,
        inputs_embeds: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """As Heads.forward."""
        return self.model(input_ids, positions, hidden_states, inputs_embeds)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """(T, H) to (T, V)."""
        return self.logits_processor(self.lm_head, hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load mtp_heads/. Raises ValueError for a tensor that is missing, unknown, or as heads begin."""
        tensors = dict(weights)
        expected = {part for name, _ in self.model.named_parameters() for part in _parts(name)}
        for what, names in (("lacks", expected - tensors.keys()), ("holds unknown", tensors.keys() - expected)):
            if names:
                raise ValueError(f"foretoken-vllm: mtp_heads/ {what} {', '.join(sorted(names))}")
        _refuse_untrained(tensors)
        named = ((f"model.{name}", tensor) for name, tensor in tensors.items())
        return AutoWeightsLoader(self).load_weights(named, mapper=LlamaModel.hf_to_vllm_mapper)


def _refuse_untrained(tensors: dict[str, Tensor]) -> None:
    """Raise ValueError for a matrix that is all zero or another head's: copies are what heads begin as."""
    for name, tensor in tensors.items():
        depth, _, rest = name.removeprefix("heads.").partition(".")
        if not name.startswith("heads.") or tensor.dim() != 2:
            continue
        if not tensor.any():
            raise ValueError(f"foretoken-vllm: mtp_heads/ {name} is all zero: it was never trained")
        for other in range(int(depth)):
            if torch.equal(tensor, tensors[f"heads.{other}.{rest}"]):
                raise ValueError(
                    f"foretoken-vllm: mtp_heads/ {name} equals that of heads.{other}: it was copied and never trained"
                )


def _checked(vllm_config: VllmConfig) -> tuple[Any, Any]:
    """The target's and the heads' config, once they fit each other and what is asked for."""
    speculation = vllm_config.speculative_config
    target, draft = vllm_config.model_config.hf_config, speculation.draft_model_config.hf_config
    heads, width = draft.num_hidden_layers, target.hidden_size
    if draft.hidden_size != heads * width or draft.vocab_size != target.vocab_size:
        raise ValueError(
            f"foretoken-vllm: {ARCHITECTURE} of width {draft.hidden_size} = {heads} heads and vocabulary "
            f"{draft.vocab_size} beside a model of width {width} and vocabulary {target.vocab_size}: "
            "serve mtp_heads/ with the model in whose directory it lies"
        )
    if (getattr(draft, "foretoken", None) or {}).get("unembedding", "shared") != "shared":
        raise ValueError(
            "foretoken-vllm: heads with unembeddings of their own are not supported: vLLM shares the model's"
        )
    if speculation.num_speculative_tokens > heads:
        raise ValueError(
            f"foretoken-vllm: num_speculative_tokens = {speculation.num_speculative_tokens}, but the checkpoint has "
            f"{heads} heads to draft with"
        )
    return target, draft


def _parts(name: str) -> list[str]:
    """Names in the file of the tensors that make up vLLM's parameter `name`."""
    for fused, parts in FUSED.items():
        if fused in name:
            return [name.replace(fused, part) for part in parts]
    return [name]
