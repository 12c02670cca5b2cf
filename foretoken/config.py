"""Configuration as data: a frozen pydantic model per section of a recipe; `recipe.py` reads them from TOML.

An unknown key is an error and a value is never repaired. `Recipe` is what a person writes.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from foretoken.config_model import HeadKind as HeadKind
from foretoken.config_model import ModelConfig as ModelConfig
from foretoken.config_model import ModelRecipe as ModelRecipe
from foretoken.config_model import RopeScaling as RopeScaling
from foretoken.config_model import Section
from foretoken.config_model import Shared as Shared
from foretoken.config_model import Unembedding as Unembedding
from foretoken.config_model import validated as validated

Fraction = Annotated[float, Field(ge=0, lt=1)]


class TokenizerConfig(Section):
    """[tokenizer]: bytes, or a `tokenizer.json` (a file, or a directory that holds one)."""

    kind: Literal["bytes", "file"] = "bytes"
    path: str | None = None

    @model_validator(mode="after")
    def _path_with_file(self) -> TokenizerConfig:
        if (self.kind == "file") != (self.path is not None):
            raise ValueError('kind = "file" needs path, and path needs kind = "file"')
        return self


class DataConfig(Section):
    """[data]: where documents come from and how they are told apart.

    A source is a file, a folder, a glob, `stdlib` (the Python standard library of this interpreter) or `hf:NAME`
    (a Hugging Face data set). A text file is one document, a record of .jsonl, .jsonl.gz or .parquet is one.

    messages_field: of records that are conversations, a list of messages with role and content, which the tokenizer's
    chat template renders; what the assistant says is learned.

    Held out for validation is, in this order: what `split_field` does not call train, the sources in `validation`, or
    `validation_fraction` of the documents by a hash of their text (of fewer than 20 texts without prompts, the
    end of each).
    """

    source: tuple[str, ...] = ("stdlib",)
    validation: tuple[str, ...] = ()
    validation_fraction: float = Field(default=0.03, gt=0, lt=1)
    split_field: str | None = None
    text_field: str = "text"
    prompt_field: str | None = None
    response_field: str | None = None
    messages_field: str | None = None
    domain_field: str | None = None
    errors: Literal["strict", "replace"] = "strict"
    cache_dir: str | None = None

    @model_validator(mode="after")
    def _prompt_with_response(self) -> DataConfig:
        if (self.prompt_field is None) != (self.response_field is None):
            raise ValueError("prompt_field and response_field go together")
        if self.messages_field is not None and self.prompt_field is not None:
            raise ValueError("messages_field and prompt_field both say what a record holds; give one of them")
        if self.split_field and self.validation:
            raise ValueError("split_field and validation both say what is held out; give one of them")
        return self


class WeightPoint(Section):
    """The heads' loss weights at one step; between two points they change linearly."""

    step: int = Field(ge=0)
    weights: tuple[float, ...]


class LossConfig(Section):
    """[loss]: how the heads' cross-entropies are counted and summed, and what they train.

    head_weights, or head_schedule: "geometric" is head_beta^(i - 1) for head i; "linear_decay" lets heads 2..n fall
    from 1 to 0 over the run; "forward" begins with head 1 and makes one more active after every n-th of the run,
    "reverse" begins with all and ends with head 1. offsets: which future tokens the one state of a model with n_future
    = 1 is scored against, with the same logits and no parameters more: [1, 2, 3], or one other token than the next,
    [4]; a weight each. head_gradients: the parts shared with head 1 that the losses of heads 2..n train: the trunk, the
    embedding where heads read it themselves, the unembedding with its norm.

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
        if "head_beta" in self.model_fields_set and self.head_schedule != "geometric":
            raise ValueError(f'head_beta is of head_schedule = "geometric", not "{self.head_schedule}"; leave it out')
        if self.soft_top_k and not self.soft:
            raise ValueError(f"soft_top_k = {self.soft_top_k} is of the term soft, which has no weight; leave it out")
        return self


class OptimConfig(Section):
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


class TrainConfig(Section):
    """[train]: how long, how much at a time, and what is written when."""

    steps: int = Field(ge=1)
    batch_size: int = Field(ge=1, description="windows per step, over all accumulation steps")
    micro_batch_size: int | None = Field(default=None, ge=1, description="windows per forward; divides batch_size")
    seq_len: int = Field(ge=1)
    attention_across_documents: bool = True
    reset_position_ids: bool = Field(default=False, description="positions count from each document's start")
    precision: Literal["auto", "bfloat16", "float32"] = "auto"
    shard_within: int = Field(default=0, ge=0, description="processes a parameter is spread over; 0: all")
    device: Literal["auto", "cpu", "cuda"] = "auto"
    compile: Literal["auto", "on", "off"] = Field(default="auto", description="torch.compile; auto: on a GPU")
    seed: int = Field(default=0, ge=0, lt=2**63)
    log_every: int = Field(default=10, ge=1)
    eval_every: int = Field(default=0, ge=0, description="steps between evaluations; 0: only at the end")
    eval_windows: int = Field(default=64, ge=1)
    save_every: int = Field(default=500, ge=1)
    keep_checkpoints: int = Field(default=1, ge=1)
    async_save: bool = Field(default=True, description="write while training goes on; takes a copy in main memory")
    tensorboard: bool = False
    wandb_project: str | None = None

    @model_validator(mode="after")
    def _micro_divides(self) -> TrainConfig:
        if self.micro_batch_size is not None and self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"micro_batch_size = {self.micro_batch_size} does not divide batch_size = {self.batch_size}"
            )
        return self


class Recipe(Section):
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
    def _parts_fit(self) -> Recipe:
        n, whole = len(self.offsets), len(set(self.loss.head_gradients)) == 3
        if self.model.start_from is not None and self.tokenizer.model_fields_set:
            given = ", ".join(f"tokenizer.{key}" for key in sorted(self.tokenizer.model_fields_set))
            raise ValueError(f"model.start_from brings the tokenizer of its model: leave out {given}")
        if self.loss.offsets and self.model.n_future > 1:
            raise ValueError(f"loss.offsets are for n_future = 1, not {self.model.n_future}: there head i has token i")
        if self.loss.distils and self.model.n_future == 1:
            raise ValueError("loss.soft, total_variation and acceptance train heads 2..n, and n_future = 1 has none")
        if not self.loss.data and not self.loss.distils:
            needs = "needs soft, total_variation or acceptance: heads 2..n would learn nothing"
            raise ValueError(f"loss.data = 0 {needs if n > 1 else 'is of heads 2..n, and n_future = 1 has none'}")
        if not whole and self.model.n_future == 1:
            raise ValueError("loss.head_gradients is of the losses of heads 2..n, and n_future = 1 has none")
        if self.model.head_kind == "anticausal" and not whole:
            raise ValueError("loss.head_gradients: anticausal heads are the next-token path, which they always train")
        plain = self.model.head_kind == "parallel" and whole
        if self.loss.method == "sequential" and not plain:
            raise ValueError(
                'loss.method = "sequential" goes head by head through parallel heads that train all they share; '
                'use loss.method = "chunked"'
            )
        for point in self.loss.head_weights:
            weights = point.weights if isinstance(point, WeightPoint) else self.loss.head_weights
            if len(weights) != n:
                raise ValueError(f"loss.head_weights has {len(weights)} weights for n_future = {n} heads")
        return self
