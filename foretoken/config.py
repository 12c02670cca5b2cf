"""Configuration as data: a frozen pydantic model per section of a recipe; `recipe.py` reads them from TOML.

An unknown key is an error and a value is never repaired. `Recipe` is what a person writes; `ModelConfig` is what a
checkpoint holds, with every number filled in by `ModelRecipe.resolve`.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from foretoken.errors import ConfigError

Architecture = Literal["llama", "mistral", "qwen2", "qwen3"]
HeadKind = Literal["parallel", "sequential"]
Shared = Literal["trunk", "embedding", "unembedding"]


Fraction = Annotated[float, Field(ge=0, lt=1)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


_SectionT = TypeVar("_SectionT", bound=_Section)


class RopeScaling(_Section):
    """Llama 3's frequency scaling, the names as Hugging Face's `rope_scaling` has them."""

    rope_type: Literal["llama3"] = "llama3"
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int


class ModelConfig(_Section):
    """Every number of a model: the next-token path in Hugging Face's names, and the heads beside it."""

    architecture: Architecture = "llama"
    vocab_size: int = Field(ge=2)
    hidden_size: int = Field(ge=1)
    intermediate_size: int = Field(ge=1)
    num_hidden_layers: int = Field(ge=1, description="blocks of the next-token path: trunk + head 1")
    num_attention_heads: int = Field(ge=1)
    num_key_value_heads: int = Field(ge=1)
    head_dim: int = Field(ge=2, multiple_of=2)
    max_position_embeddings: int = Field(ge=1)
    rope_theta: float = Field(default=10_000.0, gt=0)
    rope_scaling: RopeScaling | None = None
    rms_norm_eps: float = Field(default=1e-5, gt=0)
    tie_word_embeddings: bool = False
    n_future: int = Field(default=1, ge=1)
    head_kind: HeadKind = "parallel"

    @model_validator(mode="after")
    def _heads_divide(self) -> ModelConfig:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads = {self.num_attention_heads} must be a multiple of "
                f"num_key_value_heads = {self.num_key_value_heads}"
            )
        return self

    @model_validator(mode="after")
    def _drafter_reads_three_layers(self) -> ModelConfig:
        if self.sequential and self.num_hidden_layers < 3:
            raise ValueError(
                f'num_hidden_layers = {self.num_hidden_layers}, but head_kind = "sequential" needs at least 3: '
                f"engines give such a drafter three layers' outputs"
            )
        return self

    @property
    def sequential(self) -> bool:
        """Whether one block drafts token after token, rather than a block per token."""
        return self.head_kind == "sequential" and self.n_future > 1

    @property
    def qkv_bias(self) -> bool:
        """Qwen2 adds biases to the query, key and value projections."""
        return self.architecture == "qwen2"

    @property
    def qk_norm(self) -> bool:
        """Qwen3 normalises every head's queries and keys."""
        return self.architecture == "qwen3"


class ModelRecipe(_Section):
    """[model]: the shape. Give exactly one of `num_hidden_layers` and `total_blocks`.

    start_from: a checkpoint, of any program, whose shape, weights and tokenizer the run begins with; of its heads the
    first n_future. Further ones begin as copies of its last block. frozen: its next-token path stays as it is.
    """

    start_from: str | None = None
    frozen: bool = False
    architecture: Architecture = "llama"
    hidden_size: int | None = Field(default=None, ge=1)
    num_attention_heads: int | None = Field(default=None, ge=1)
    num_key_value_heads: int | None = Field(default=None, ge=1)
    head_dim: int | None = None
    intermediate_size: int | None = Field(default=None, ge=1)
    num_hidden_layers: int | None = Field(default=None, ge=1)
    total_blocks: int | None = Field(default=None, ge=1, description="blocks of the next-token path and of the heads")
    max_position_embeddings: int | None = Field(default=None, ge=1)
    rope_theta: float = Field(default=10_000.0, gt=0)
    rope_scaling: RopeScaling | None = None
    rms_norm_eps: float = Field(default=1e-5, gt=0)
    tie_word_embeddings: bool = False
    n_future: int = Field(default=4, ge=1)
    head_kind: HeadKind = "parallel"
    head_init: Literal["random", "last_block"] | None = Field(
        default=None, description="by default random, and last_block with start_from"
    )

    @property
    def blocks_beside(self) -> int:
        """Blocks that are not the next-token path's: one per further head, or the sequential head's only one."""
        return min(1, self.n_future - 1) if self.head_kind == "sequential" else self.n_future - 1

    @model_validator(mode="after")
    def _own_shape_or_another(self) -> ModelRecipe:
        own = self.model_fields_set - {"start_from", "frozen", "n_future", "head_kind", "head_init"}
        if self.start_from is not None and own:
            raise ValueError(f"start_from brings the shape of its model: leave out {', '.join(sorted(own))}")
        if self.frozen and (self.start_from is None or self.n_future == 1):
            raise ValueError("frozen leaves only heads to train: it needs start_from and n_future > 1")
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
        fields = self.model_dump(exclude={"total_blocks", "head_init", "start_from", "frozen"})
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


class TokenizerConfig(_Section):
    """[tokenizer]: bytes, or a `tokenizer.json` (a file, or a directory that holds one)."""

    kind: Literal["bytes", "file"] = "bytes"
    path: str | None = None

    @model_validator(mode="after")
    def _path_with_file(self) -> TokenizerConfig:
        if (self.kind == "file") != (self.path is not None):
            raise ValueError('kind = "file" needs path, and path needs kind = "file"')
        return self


class DataConfig(_Section):
    """[data]: where documents come from and how they are told apart.

    A source is a file, a folder, a glob, `stdlib` (the Python standard library of this interpreter) or `hf:NAME`
    (a Hugging Face data set). A text file is one document, a record of .jsonl, .jsonl.gz or .parquet is one.

    Held out for validation is, in this order: what `split_field` does not call train, the sources in `validation`, or
    `validation_fraction` of the documents by a hash of their text (of fewer than 20 documents, the end of each).
    """

    source: tuple[str, ...] = ("stdlib",)
    validation: tuple[str, ...] = ()
    validation_fraction: float = Field(default=0.03, gt=0, lt=1)
    split_field: str | None = None
    text_field: str = "text"
    prompt_field: str | None = None
    response_field: str | None = None
    domain_field: str | None = None
    errors: Literal["strict", "replace"] = "strict"
    cache_dir: str | None = None

    @model_validator(mode="after")
    def _prompt_with_response(self) -> DataConfig:
        if (self.prompt_field is None) != (self.response_field is None):
            raise ValueError("prompt_field and response_field go together")
        if self.split_field and self.validation:
            raise ValueError("split_field and validation both say what is held out; give one of them")
        return self


class WeightPoint(_Section):
    """The heads' loss weights at one step; between two points they change linearly."""

    step: int = Field(ge=0)
    weights: tuple[float, ...]


class LossConfig(_Section):
    """[loss]: how the heads' cross-entropies are counted and summed, and what they train.

    head_weights, or head_schedule: "geometric" is head_beta^(i - 1) for head i; "linear_decay" lets heads 2..n fall
    from 1 to 0 over the run; "forward" begins with head 1 and makes one more active after every n-th of the run,
    "reverse" begins with all and ends with head 1. offsets: which future tokens the one state of a model with n_future
    = 1 is scored against, with the same logits and no parameters more: [1, 2, 3], or one other token than the next,
    [4]; a weight each. head_gradients: the parts shared with head 1 that the losses of heads 2..n train: the trunk, the
    embedding where a sequential head reads it, the unembedding with its norm.

    Heads 2..n learn from the data's tokens (data), and from head 1's distribution p of the same token, where that is in
    the window: soft is cross-entropy with p (its soft_top_k likeliest tokens), total_variation TV(p, q), acceptance
    -log sum(min(p, q)), the chance that a draft is accepted. The numbers are weights of these terms.
    """

    method: Literal["chunked", "sequential"] = "chunked"
    targets_across_documents: bool = False
    head_weights: tuple[float, ...] | tuple[WeightPoint, ...] = ()
    head_schedule: Literal["constant", "geometric", "linear_decay", "forward", "reverse"] = "constant"
    head_beta: float = Field(default=0.8, gt=0)
    offsets: tuple[Annotated[int, Field(ge=1)], ...] = ()
    head_gradients: tuple[Shared, ...] = ("trunk", "embedding", "unembedding")
    data: float = Field(default=1.0, ge=0)
    soft: float = Field(default=0.0, ge=0)
    soft_top_k: int = Field(default=0, ge=0, description="0: all tokens")
    total_variation: float = Field(default=0.0, ge=0)
    acceptance: float = Field(default=0.0, ge=0)

    @property
    def distils(self) -> bool:
        """Whether heads learn from head 1's distribution."""
        return self.soft + self.total_variation + self.acceptance > 0

    @model_validator(mode="after")
    def _one_schedule(self) -> LossConfig:
        if self.head_weights and self.head_schedule != "constant":
            raise ValueError(f'head_weights and head_schedule = "{self.head_schedule}" both say the weights; give one')
        if sorted(set(self.offsets)) != list(self.offsets):
            raise ValueError(f"offsets = {list(self.offsets)} must rise")
        if self.method == "sequential" and (self.offsets or self.distils):
            raise ValueError('offsets and distillation need method = "chunked"')
        return self


class OptimConfig(_Section):
    """[optim]: AdamW with the paper's settings, or Muon for matrices with AdamW for the rest."""

    name: Literal["adamw", "muon"] = "adamw"
    lr: float = Field(default=3e-4, gt=0, description="AdamW's peak learning rate")
    muon_lr: float = Field(default=0.02, gt=0, description="Muon's peak learning rate, for matrices inside blocks")
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.1, ge=0)
    warmup_steps: int = Field(default=100, ge=0)
    final_lr_ratio: float = Field(default=0.03, ge=0, le=1)
    clip: float = Field(default=1.0, gt=0)


class TrainConfig(_Section):
    """[train]: how long, how much at a time, and what is written when."""

    steps: int = Field(ge=1)
    batch_size: int = Field(ge=1, description="windows per step, over all accumulation steps")
    micro_batch_size: int | None = Field(default=None, ge=1, description="windows per forward; divides batch_size")
    seq_len: int = Field(ge=1)
    attention_across_documents: bool = True
    precision: Literal["auto", "bfloat16", "float32"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    compile: Literal["auto", "on", "off"] = Field(default="auto", description="torch.compile; auto: on a GPU")
    seed: int = Field(default=0, ge=0)
    log_every: int = Field(default=10, ge=1)
    eval_every: int = Field(default=0, ge=0, description="steps between evaluations; 0: only at the end")
    eval_windows: int = Field(default=64, ge=1)
    save_every: int = Field(default=500, ge=1)
    keep_checkpoints: int = Field(default=1, ge=1)
    tensorboard: bool = False
    wandb_project: str | None = None

    @model_validator(mode="after")
    def _micro_divides(self) -> TrainConfig:
        if self.micro_batch_size is not None and self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"micro_batch_size = {self.micro_batch_size} does not divide batch_size = {self.batch_size}"
            )
        return self


class Recipe(_Section):
    """A whole training run."""

    model: ModelRecipe
    tokenizer: TokenizerConfig = TokenizerConfig()
    data: DataConfig = DataConfig()
    loss: LossConfig = LossConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig

    @property
    def offsets(self) -> tuple[int, ...]:
        """What the losses are of: head i predicts the i-th next token, or see `LossConfig.offsets`."""
        return self.loss.offsets or tuple(range(1, self.model.n_future + 1))

    @model_validator(mode="after")
    def _offsets_of_one_head(self) -> Recipe:
        if self.loss.offsets and self.model.n_future > 1:
            raise ValueError(f"loss.offsets are for n_future = 1, not {self.model.n_future}: there head i has token i")
        if self.loss.distils and self.model.n_future == 1:
            raise ValueError("loss.soft, total_variation and acceptance train heads 2..n, and n_future = 1 has none")
        return self

    @model_validator(mode="after")
    def _weights_per_head(self) -> Recipe:
        n = len(self.offsets)
        for point in self.loss.head_weights:
            weights = point.weights if isinstance(point, WeightPoint) else self.loss.head_weights
            if len(weights) != n:
                raise ValueError(f"loss.head_weights has {len(weights)} weights for n_future = {n} heads")
        return self

    @model_validator(mode="after")
    def _per_head_backward(self) -> Recipe:
        plain = self.model.head_kind == "parallel" and len(set(self.loss.head_gradients)) == 3
        if self.loss.method == "sequential" and not plain:
            raise ValueError(
                'loss.method = "sequential" goes head by head through parallel heads that train all they share; '
                'use loss.method = "chunked"'
            )
        return self


def validated(section: type[_SectionT], values: object, where: str) -> _SectionT:
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
            annotation = parent.model_fields[str(part)].annotation if hasattr(parent, "model_fields") else None
            parent = annotation
        known = sorted(parent.model_fields) if hasattr(parent, "model_fields") else []
        return f"unknown key '{key}'" + (f"; known are {', '.join(known)}" if known else "")
    if problem["type"] == "missing":
        return f"'{key}' is missing"
    text = problem["msg"].removeprefix("Value error, ")
    shown = f" (got {json.dumps(problem['input'], default=str)})" if key and problem["type"] != "value_error" else ""
    return f"{key}: {text}{shown}" if key else text
