"""Multi-token prediction in transformers: models whose further heads draft in `generate(use_mtp=True)`.

`foretoken export hf` puts a copy of this file beside the weights, where `trust_remote_code=True` finds it. It needs
PyTorch and transformers alone; drafting needs a transformers that has `use_mtp`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.generation.candidate_generator import CandidateGenerator
from transformers.masking_utils import create_causal_mask
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm


class SequentialHead(LlamaDecoderLayer):
    """A Llama layer whose attention reads a token's embedding and a hidden state side by side: an EAGLE-3 layer."""

    def __init__(self, config: Any) -> None:
        shape = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")
        plain = LlamaConfig(**{key: getattr(config, key) for key in shape}, rms_norm_eps=config.rms_norm_eps)
        super().__init__(plain, 0)
        for name in ("q_proj", "k_proj", "v_proj"):
            narrow = getattr(self.self_attn, name)
            setattr(self.self_attn, name, nn.Linear(2 * config.hidden_size, narrow.out_features, bias=False))
        self.self_attn.config = config  # says which implementation of attention the model uses
        self.hidden_norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, embedded: Tensor, hidden: Tensor, **kwargs: Any) -> Tensor:
        """Embeddings and states (1, T, D) -> states (1, T, D), not normalised."""
        both = torch.cat((self.input_layernorm(embedded), self.hidden_norm(hidden)), -1)
        hidden = hidden + self.self_attn(hidden_states=both, **kwargs)[0]
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class HeadsCandidateGenerator(CandidateGenerator):
    """Drafts of a model's heads 2..n, which read the input of its last layer.

    Each head has keys and values of every certain position in a cache of its own. No logits go along with the drafts:
    transformers then takes the model's own choice, or draws, and keeps a draft that equals it.
    """

    requires_model_outputs = True
    model_kwargs_overrides = {"output_hidden_states": True}  # noqa: RUF012 - as transformers declares it

    def __init__(self, model: Any, drafts: int, max_length: int) -> None:
        self.model, self.drafts, self.max_length = model, drafts, max_length
        self.cache = DynamicCache()

    def get_candidates(
        self,
        input_ids: Tensor,
        model_kwargs: dict[str, Any] | None = None,
        model_outputs: Any = None,
        is_first_iteration: bool = False,
        n_last_matches: int = 0,
        **_: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """The certain tokens (1, N) with at most `drafts` more behind them, none that would pass max_length."""
        drafts = min(self.drafts, self.max_length - input_ids.shape[1] - 1)
        if is_first_iteration or drafts < 1:  # at first nothing has been computed that a head could read
            return input_ids, None
        read, known = self.cache.get_seq_length(), input_ids.shape[1] - 1
        trunk = model_outputs.hidden_states[self.model.config.num_hidden_layers - 1]
        trunk = trunk[:, : known - read]  # behind that lie drafts that were refused
        mask = (model_kwargs or {}).get("attention_mask")
        if mask is None:
            mask = torch.ones_like(input_ids)
        mask = mask[:, :known]
        positions = (model_kwargs or {}).get("position_ids")
        if positions is None:
            positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
        draft = self._sequential if self.model.config.head_kind == "sequential" else self._parallel
        tokens = draft(input_ids[:, read + 1 :], trunk, mask, positions[:, read:known], drafts)
        return torch.cat((input_ids, tokens.to(input_ids.device)), -1), None

    def _parallel(self, _: Tensor, trunk: Tensor, mask: Tensor, positions: Tensor, drafts: int) -> Tensor:
        """A token (1, drafts) of each head; all heads read the same states."""
        shared = self._shared(trunk, mask, positions)
        # A head that drafts nothing now must read on: its cache has all certain positions.
        states = [head(trunk, **shared) for head in self.model.mtp_heads]
        return torch.cat([self._choice(state, depth) for depth, state in enumerate(states[:drafts])], -1)

    def _sequential(self, tokens: Tensor, trunk: Tensor, mask: Tensor, positions: Tensor, drafts: int) -> Tensor:
        """Tokens (1, drafts) one behind the other: each is read, with the state it came from, to draft the next."""
        head, embed = self.model.mtp_heads[0], self.model.get_input_embeddings()
        state = head(embed(tokens), trunk, **self._shared(trunk, mask, positions))[:, -1:]
        chosen = [self._choice(state, 0)]
        while len(chosen) < drafts:
            mask, positions = nn.functional.pad(mask, (0, 1), value=1), positions[:, -1:] + 1
            state = head(embed(chosen[-1]), state, **self._shared(state, mask, positions))
            chosen.append(self._choice(state, len(chosen)))
        if drafts > 1:
            self.cache.crop(1 - drafts)
        return torch.cat(chosen, -1)

    def _shared(self, x: Tensor, mask: Tensor, positions: Tensor) -> dict[str, Any]:
        """What a decoder layer is given beside its input x (1, T, D), T rows behind those in the cache."""
        config = self.model.config
        return {
            "attention_mask": create_causal_mask(
                config=config, inputs_embeds=x, attention_mask=mask, past_key_values=self.cache, position_ids=positions
            ),
            "position_ids": positions,
            "past_key_values": self.cache,
            "use_cache": True,
            "position_embeddings": self.model.model.rotary_emb(x, position_ids=positions),
        }

    def _choice(self, states: Tensor, draft: int) -> Tensor:
        """The likeliest token (1, 1) by the last of states (1, T, D), for a step's draft number `draft`."""
        unembed = self.model.mtp_unembeddings[draft] if self.model.mtp_unembeddings else self.model.lm_head
        return unembed(self.model.model.norm(states[:, -1:])).argmax(-1)


class Drafting:
    """What the four classes below add to transformers' own: heads 2..n, or the sequential one, as `mtp_heads`."""

    def _add_heads(self: Any) -> None:
        config, heads = self.config, []
        if config.head_kind == "sequential":
            heads = [SequentialHead(config)]
        else:
            for depth in range(config.n_future - 1):
                heads.append(type(self.model.layers[0])(config, 0))
                heads[-1].self_attn.layer_idx = depth  # in the heads' own cache
        self.mtp_heads = nn.ModuleList(heads)
        own = config.n_future - 1 if getattr(config, "unembedding", "shared") == "per_head" else 0
        self.mtp_unembeddings = nn.ModuleList(
            nn.Linear(config.hidden_size, config.vocab_size, bias=False) for _ in range(own)
        )
        self.post_init()

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As transformers', but a weight that is missing or unknown is an error: no head is ever made up."""
        wants_info = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        for key, what in (("missing_keys", "is missing"), ("unexpected_keys", "is not one of this model's")):
            if names := sorted(info[key]):
                more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
                raise ValueError(f"{args[0]}: tensor '{names[0]}' {what}{more}")
        return (model, info) if wants_info else model

    def _get_candidate_generator(self: Any, generation_config: Any, **kwargs: Any) -> Any:
        if not generation_config.use_mtp:
            return super()._get_candidate_generator(generation_config=generation_config, **kwargs)
        given = kwargs["model_kwargs"]
        cached = given.get("past_key_values")
        if given.get("inputs_embeds") is not None or (cached is not None and cached.get_seq_length() > 0):
            raise ValueError(
                "generate(use_mtp=True) must read the whole prompt: leave out inputs_embeds and past_key_values"
            )
        most = self.config.n_future - 1
        drafts = min(generation_config.num_assistant_tokens or most, most)
        return HeadsCandidateGenerator(self, drafts, generation_config.max_length)


class ForetokenLlamaConfig(LlamaConfig):
    """Llama's configuration with `n_future` and `head_kind`, "parallel" or "sequential"."""

    model_type = "foretoken_llama"


class ForetokenMistralConfig(MistralConfig):
    """Mistral's configuration with `n_future` and `head_kind`, "parallel" or "sequential"."""

    model_type = "foretoken_mistral"


class ForetokenQwen2Config(Qwen2Config):
    """Qwen2's configuration with `n_future` and `head_kind`, "parallel" or "sequential"."""

    model_type = "foretoken_qwen2"


class ForetokenQwen3Config(Qwen3Config):
    """Qwen3's configuration with `n_future` and `head_kind`, "parallel" or "sequential"."""

    model_type = "foretoken_qwen3"


class ForetokenLlamaForCausalLM(Drafting, LlamaForCausalLM):
    """Llama with further heads."""

    config_class = ForetokenLlamaConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self._add_heads()


class ForetokenMistralForCausalLM(Drafting, MistralForCausalLM):
    """Mistral with further heads."""

    config_class = ForetokenMistralConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self._add_heads()


class ForetokenQwen2ForCausalLM(Drafting, Qwen2ForCausalLM):
    """Qwen2 with further heads."""

    config_class = ForetokenQwen2Config

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self._add_heads()


class ForetokenQwen3ForCausalLM(Drafting, Qwen3ForCausalLM):
    """Qwen3 with further heads."""

    config_class = ForetokenQwen3Config

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self._add_heads()


def register() -> None:
    """Make these classes known to AutoConfig and AutoModelForCausalLM: no trust_remote_code is needed then."""
    for model in (
        ForetokenLlamaForCausalLM,
        ForetokenMistralForCausalLM,
        ForetokenQwen2ForCausalLM,
        ForetokenQwen3ForCausalLM,
    ):
        AutoConfig.register(model.config_class.model_type, model.config_class, exist_ok=True)
        AutoModelForCausalLM.register(model.config_class, model, exist_ok=True)
        # So that save_pretrained puts this file beside the weights, for those who load them with trust_remote_code.
        model.config_class.register_for_auto_class()
        model.register_for_auto_class("AutoModelForCausalLM")
