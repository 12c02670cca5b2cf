"""The model's part of the configuration: the shape that a recipe asks for, and the one that a checkpoint holds.

`ModelConfig` has every number filled in, by `ModelRecipe.resolve` or from a checkpoint.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from foretoken.errors import ConfigError

Architecture = Literal["llama", "mistral", "qwen2", "qwen3"]
HeadKind = Literal["parallel", "linear", "causal", "anticausal", "joint", "sequential", "deepseek"]
Unembedding = Literal["shared", "per_head"]
Shared = Literal["trunk", "embedding", "unembedding"]
Matrix = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
Width = Annotated[int, Field(ge=1, lt=2**31)]
Blocks = Annotated[int, Field(ge=1, le=4096)]
MATRICES: tuple[Matrix, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class Section(BaseModel):
    """A section of a recipe: nothing can be changed, and nothing unknown or infinite given."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


SectionT = TypeVar("SectionT", bound=Section)


class RopeScaling(Section):
    """Llama 3's frequency scaling, the names as Hugging Face's `rope_scaling` has them."""

    rope_type: Literal["llama3"] = "llama3"
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int


class ModelConfig(Section):
    """Every number of a model: the next-token path in Hugging Face's names, and the heads beside it."""

    architecture: Architecture = "llama"
    vocab_size: int = Field(ge=2, lt=2**31)
    hidden_size: Width
    intermediate_size: Width
    num_hidden_layers: Blocks = Field(description="blocks of the next-token path: trunk + head 1")
    num_attention_heads: Width
    num_key_value_heads: Width
    head_dim: int = Field(ge=2, lt=2**31, multiple_of=2)
    max_position_embeddings: Width
    rope_theta: float = Field(default=10_000.0, gt=0)
    rope_scaling: RopeScaling | None = None
    rms_norm_eps: float = Field(default=1e-5, gt=0)
    tie_word_embeddings: bool = False
    n_future: Blocks = 1
    head_kind: HeadKind = "parallel"
    shared_block: bool = Field(default=False, description="of deepseek heads: all depths run one block")
    unembedding: Unembedding = "shared"

    @model_validator(mode="after")
    def _heads_divide(self) -> ModelConfig:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads = {self.num_attention_heads} must be a multiple of "
                f"num_key_value_heads = {self.num_key_value_heads}"
            )
        return self

    @model_validator(mode="after")
    def _kind_fits(self) -> ModelConfig:
        _check_shared_block(self)
        if self.sequential and self.num_hidden_layers < 3:
            raise ValueError(
                f'num_hidden_layers = {self.num_hidden_layers}, but head_kind = "sequential" needs at least 3: '
                f"engines give such a drafter three layers' outputs"
            )
        if self.head_kind == "anticausal" and self.num_hidden_layers < self.n_future:
            raise ValueError(
                f"num_hidden_layers = {self.num_hidden_layers}, but {self.n_future} anticausal heads are the last "
                f"{self.n_future} blocks of the next-token path"
            )
        return self

    @property
    def sequential(self) -> bool:
        """Whether one block drafts token after token, rather than a block per token."""
        return self.head_kind == "sequential" and self.n_future > 1

    @property
    def portable(self) -> bool:
        """Whether other programs have a form for these heads; the others are foretoken's alone."""
        return self.head_kind in ("parallel", "sequential")

    @property
    def trunk_blocks(self) -> int:
        """Blocks in front of the heads."""
        return self.num_hidden_layers - (self.n_future if self.head_kind == "anticausal" else 1)

    @property
    def drafts_follow(self) -> bool:
        """Whether a draft depends on the drafts before it, and not on the text alone."""
        return self.head_kind in ("joint", "sequential", "deepseek") and self.n_future > 1

    @property
    def own_unembeddings(self) -> bool:
        """Whether heads 2..n each have an unembedding of their own."""
        return self.unembedding == "per_head" and self.n_future > 1

    @property
    def goes_on(self) -> bool:
        """Whether drafting can go on beyond the n - 1 tokens that training knew."""
        return self.sequential and not self.own_unembeddings

    @property
    def qkv_bias(self) -> bool:
        """Qwen2 adds biases to the query, key and value projections."""
        return self.architecture == "qwen2"

    @property
    def qk_norm(self) -> bool:
        """Qwen3 normalises every head's queries and keys."""
        return self.architecture == "qwen3"


def _check_shared_block(model: ModelConfig | ModelRecipe) -> None:
    if model.shared_block and model.head_kind != "deepseek":
        raise ValueError(f'shared_block is of head_kind = "deepseek", not "{model.head_kind}"')


# Keys of ModelRecipe that say what a run begins with and what learns, not what shape the model has.
_OF_THE_RUN = ("start_from", "frozen", "head_init", "lora_rank", "lora_alpha", "lora_target_modules")


class ModelRecipe(Section):
    """[model]: the shape. Give exactly one of `num_hidden_layers` and `total_blocks`.

    start_from: a checkpoint, of any program, whose shape, weights and tokenizer the run begins with; of its heads the
    first n_future, of its kind where nothing else is said. Further ones begin as copies of its last block.
    frozen: its next-token path stays as it is.
    unembedding: one matrix for all heads, or for heads 2..n one each beside it (replicated unembedding).
    lora_rank: of its next-token path adapters of this rank learn alone, beside the lora_target_modules of its blocks,
    scaled by lora_alpha / lora_rank.
    """

    start_from: str | None = None
    frozen: bool = False
    lora_rank: Width | None = None
    lora_alpha: Width | None = Field(default=None, description="by default twice the rank")
    lora_target_modules: tuple[Matrix, ...] = Field(default=MATRICES, min_length=1)
    architecture: Architecture = "llama"
    hidden_size: Width | None = None
    num_attention_heads: Width | None = None
    num_key_value_heads: Width | None = None
    head_dim: int | None = None
    intermediate_size: Width | None = None
    num_hidden_layers: Blocks | None = None
    total_blocks: Blocks | None = Field(default=None, description="blocks of the next-token path and of the heads")
    max_position_embeddings: Width | None = None
    rope_theta: float = Field(default=10_000.0, gt=0)
    rope_scaling: RopeScaling | None = None
    rms_norm_eps: float = Field(default=1e-5, gt=0)
    tie_word_embeddings: bool = False
    n_future: Blocks = 4
    head_kind: HeadKind = "parallel"
    shared_block: bool = False
    unembedding: Unembedding = "shared"
    head_init: Literal["random", "last_block"] | None = Field(
        default=None, description="by default random, and last_block with start_from"
    )

    @property
    def blocks_beside(self) -> int:
        """Blocks that are not the next-token path's: one per further head, or one that all depths run, or none."""
        if self.head_kind in ("linear", "anticausal"):
            return 0
        return min(1, self.n_future - 1) if self.head_kind == "sequential" or self.shared_block else self.n_future - 1

    @model_validator(mode="after")
    def _own_shape_or_another(self) -> ModelRecipe:
        _check_shared_block(self)
        own = self.model_fields_set - {*_OF_THE_RUN, "n_future", "head_kind", "shared_block", "unembedding"}
        if self.start_from is not None and own:
            raise ValueError(f"start_from brings the shape of its model: leave out {', '.join(sorted(own))}")
        apart = self.frozen or self.lora_rank is not None or self.head_init == "last_block"
        if apart and self.head_kind == "anticausal" and self.n_future > 1:
            rule = "none is a copy, or learns alone; name another head_kind"
            raise ValueError(f"anticausal heads are blocks of the next-token path: {rule}")
        if self.frozen and (self.start_from is None or self.n_future == 1):
            raise ValueError("frozen leaves only heads to train: it needs start_from and n_future > 1")
        if self.lora_rank is not None and (self.start_from is None or self.frozen):
            raise ValueError("lora_rank adapts a model that exists: it needs start_from, without frozen")
        if self.lora_rank is None and self.model_fields_set & {"lora_alpha", "lora_target_modules"}:
            raise ValueError("lora_alpha and lora_target_modules need lora_rank")
        for key in ("hidden_size", "num_attention_heads") if self.start_from is None else ():
            if getattr(self, key) is None:
                raise ValueError(f"'{key}' is missing")
        return self

    @model_validator(mode="after")
    def _one_depth(self) -> ModelRecipe:
        if self.start_from is not None:
            return self
        assert self.hidden_size is not None
        assert self.num_attention_heads is not None
        if (self.num_hidden_layers is None) == (self.total_blocks is None):
            raise ValueError("give exactly one of num_hidden_layers and total_blocks")
        if self.total_blocks is not None and self.total_blocks <= self.blocks_beside:
            raise ValueError(
                f"total_blocks = {self.total_blocks} leaves no block for head 1 beside n_future = {self.n_future} "
                f"{self.head_kind} heads; total_blocks must be at least {self.blocks_beside + 1}"
            )
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size = {self.hidden_size} is not a multiple of num_attention_heads = "
                f"{self.num_attention_heads}; change one or give head_dim"
            )
        return self

    def resolve(self, vocab_size: int, seq_len: int) -> ModelConfig:
        """The full model configuration for a vocabulary of `vocab_size` tokens and windows of `seq_len` tokens."""
        assert self.hidden_size is not None
        assert self.num_attention_heads is not None
        positions = self.max_position_embeddings or seq_len
        if positions < seq_len:
            raise ConfigError(
                f"model.max_position_embeddings = {positions} is below train.seq_len = {seq_len}; raise the first"
            )
        layers = self.num_hidden_layers
        if layers is None:
            assert self.total_blocks is not None
            layers = self.total_blocks - self.blocks_beside
        fields = self.model_dump(exclude={*_OF_THE_RUN, "total_blocks"})
        fields.update(
            vocab_size=vocab_size,
            num_hidden_layers=layers,
            num_key_value_heads=self.num_key_value_heads or self.num_attention_heads,
            head_dim=self.head_dim or self.hidden_size // self.num_attention_heads,
            intermediate_size=self.intermediate_size or _llama_ffn(self.hidden_size),
            max_position_embeddings=positions,
        )
        return validated(ModelConfig, fields, "model")


def _llama_ffn(hidden_size: int, multiple: int = 64) -> int:
    """Llama's SwiGLU width: 8/3 of the model's, rounded up, so that a block has 12 x hidden_size^2 parameters."""
    return -(-8 * hidden_size // (3 * multiple)) * multiple


def validated(section: type[SectionT], values: object, where: str) -> SectionT:
    """`values` as a `section`; raises ConfigError with one line that names the key, the value and the rule."""
    try:
        return section.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{where}: {_first_problem(section, error)}") from None


def _first_problem(section: type[BaseModel], error: ValidationError) -> str:
    problem = error.errors()[0]
    key = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        parent: Any = section
        for part in problem["loc"][:-1]:
            parent = parent.model_fields[str(part)].annotation if hasattr(parent, "model_fields") else None
        known = sorted(parent.model_fields) if hasattr(parent, "model_fields") else []
        return f"unknown key '{key}'" + (f"; known are {', '.join(known)}" if known else "")
    if problem["type"] == "missing":
        return f"'{key}' is missing"
    text = problem["msg"].removeprefix("Value error, ")
    shown = f" (got {json.dumps(problem['input'], default=str)})" if key and problem["type"] != "value_error" else ""
    return f"{key}: {text}{shown}" if key else text
