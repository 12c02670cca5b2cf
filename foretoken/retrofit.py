"""What a run begins with: a new model, heads for one that exists, or its own checkpoint; what must hold at its end."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from foretoken.checkpoint import find_checkpoint, load_model, read_config
from foretoken.config import ModelConfig, ModelRecipe, Recipe, validated
from foretoken.errors import CheckpointError, ConfigError, TrainingError
from foretoken.formats import hf
from foretoken.lora import add_adapters, merged
from foretoken.model import Model
from foretoken.parallel import ALONE, World, whole
from foretoken.tokenizer import Tokenizer
from foretoken.tokenizer import load as load_tokenizer
from foretoken.train_state import load_adapters

HEADS = ("head_kind", "shared_block", "unembedding")  # keys of [model] that say what heads 2..n are


def with_its_heads(recipe: Recipe) -> Recipe:
    """The recipe with heads as the checkpoint has them that it starts from, where that has some and it names no others.

    Raises ConfigError where such heads cannot do what the recipe asks.
    """
    model = recipe.model
    if model.start_from is None or model.n_future == 1:
        return recipe
    old, said = read_config(find_checkpoint(model.start_from)), model.model_fields_set
    if old.n_future == 1 or ("head_kind" in said and model.head_kind != old.head_kind):
        return recipe
    values = recipe.model_dump(exclude_unset=True)
    values["model"] |= {key: getattr(old, key) for key in HEADS if key not in said}
    return validated(Recipe, values, f"recipe with the heads of {model.start_from}")


def starting_config(recipe: ModelRecipe, seq_len: int) -> tuple[ModelConfig, Tokenizer]:
    """The shape and the tokenizer of the checkpoint that `recipe` starts from, with the recipe's heads."""
    assert recipe.start_from is not None
    folder = find_checkpoint(recipe.start_from)
    config, tokenizer = read_config(folder), load_tokenizer(folder)
    if tokenizer.vocab_size > config.vocab_size:
        raise ConfigError(f"{folder}: tokenizer of {tokenizer.vocab_size} tokens beside a model of {config.vocab_size}")
    if seq_len > config.max_position_embeddings:
        raise ConfigError(
            f"train.seq_len = {seq_len} exceeds the {config.max_position_embeddings} positions of {folder}"
        )
    wanted = validated(ModelConfig, config.model_dump() | recipe.model_dump(include={"n_future", *HEADS}), "model")
    given = config.n_future if config.head_kind == "anticausal" else 1
    if wanted.head_kind == "anticausal" and wanted.n_future > max(1, given):
        rule = f"none is added to its {given}; name another model.head_kind, or a lower model.n_future"
        raise ConfigError(f"{folder}: anticausal heads are blocks of the next-token path: {rule}")
    return wanted, tokenizer


def make_model(start: Path | None, recipe: ModelRecipe, config: ModelConfig, seed: int) -> Model:
    """What the recipe says training begins with, or what the checkpoint `start` of its run holds."""
    if start is not None:
        return resumed_model(start, recipe, config, seed).train()
    if recipe.start_from is not None:
        return starting_model(recipe, config, seed)
    model = Model(config)
    model.init_weights(seed)
    if recipe.head_init == "last_block":
        model.start_from_head_1()
    return model


def outline(recipe: ModelRecipe, config: ModelConfig, seed: int) -> Model:
    """The parts of what `make_model` makes, in memory that nothing has written to, which takes no room."""
    with torch.device("meta"):
        model = Model(config)
    model.to_empty(device="cpu")
    if config.tie_word_embeddings:
        model.lm_head.weight = model.embed_tokens.weight
    return _as_trained(model, recipe, seed)


def _as_trained(model: Model, recipe: ModelRecipe, seed: int) -> Model:
    """With adapters, and nothing to learn for what is frozen."""
    if recipe.frozen or recipe.lora_rank is not None:
        freeze(model)
    if recipe.lora_rank is not None:
        add_adapters(model, recipe, seed)
    return model


def starting_model(recipe: ModelRecipe, config: ModelConfig, seed: int) -> Model:
    """The checkpoint's weights in float32, with the heads it has; further ones as `head_init` says, by default copies
    of its last block, so that every head predicts what head 1 does."""
    assert recipe.start_from is not None
    old = load_model(find_checkpoint(recipe.start_from), torch.float32)
    model = Model(config)
    model.init_weights(seed)
    state, given = model.state_dict(), old.state_dict()
    path = {hf.main_name(name, old.config): tensor for name, tensor in given.items()}  # which may have other names here
    if (old.config.head_kind, old.config.shared_block) != (config.head_kind, config.shared_block):
        given = {"lm_head.weight": given["lm_head.weight"]}
    names = {name: hf.main_name(name, config) for name in state}
    given |= {name: path[there] for name, there in names.items() if there is not None}
    if recipe.head_init != "random":
        model.heads[0].load_state_dict(old.heads[0].state_dict())
        model.lm_head.load_state_dict(old.lm_head.state_dict())
        model.start_from_head_1()
        state = model.state_dict()
    model.load_state_dict({name: given.get(name, tensor) for name, tensor in state.items()})
    return _as_trained(model, recipe, seed)


def resumed_model(folder: Path, recipe: ModelRecipe, config: ModelConfig, seed: int) -> Model:
    """The model of a run's checkpoint, as `starting_model` made it and training left it: adapters are apart again.

    Raises CheckpointError where what the run started from is no longer what these adapters were trained beside.
    """
    stored = load_model(folder, None)
    if recipe.lora_rank is None:
        return _as_trained(stored, recipe, seed)
    model = starting_model(recipe, config, seed)
    load_adapters(folder, model)
    values = dict(stored.named_parameters())
    for name, parameter in model.named_parameters():
        if hf.main_name(name, config) is None:
            parameter.data.copy_(values[name])
    for name, value in merged(model):  # summed again, maybe by another kernel
        if not torch.allclose(value, values[name], rtol=1e-4, atol=1e-5):
            raise CheckpointError(f"{folder}: '{name}' is not of {recipe.start_from} with adapters: it has changed")
    return model


def freeze(model: Model) -> None:
    """Let nothing of the next-token path learn; it then runs without a graph."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(hf.main_name(name, model.config) is None)


def _unlearned(now: Tensor, began: Tensor) -> bool:
    """Whether a weight is what it began as, or all of it is smaller by the same factor, as weight decay makes it."""
    if torch.equal(now, began):
        return True
    factor = (now.double() * began).sum() / (began.double() ** 2).sum()
    return torch.allclose(now, (factor * began).to(now.dtype), rtol=1e-4, atol=0.0)


def check_trained(run: Path, model: Model, recipe: ModelRecipe, seed: int, world: World = ALONE) -> None:
    """Of a run that started from a checkpoint: raises TrainingError where a head of `model`, or all its adapters, are
    what they began as, a frozen weight is not, or the checkpoint saved in `run` does not hold the model."""
    if recipe.start_from is None:
        return

    def held(values: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
        wholes = ((name, whole(value.detach())) for name, value in values)
        return {name: value.cpu() if world.first else torch.empty(0) for name, value in wholes}

    now, saved = held(model.named_parameters()), held(merged(model))
    world.first_does(lambda: _check_trained(run, model, recipe, seed, now, saved))


def _check_trained(
    run: Path, model: Model, recipe: ModelRecipe, seed: int, now: dict[str, Tensor], saved: dict[str, Tensor]
) -> None:
    began = dict(starting_model(recipe, model.config, seed).named_parameters())
    learning = {f"head {depth + 1} has": f"heads.{depth}." for depth in range(1, len(model.heads))}
    learning |= {
        f"head {d + 2}'s unembedding has": f"own_unembeddings.{d}." for d in range(len(model.own_unembeddings))
    }
    learning |= {"the adapters have": ".lora_B."} if recipe.lora_rank is not None else {}
    for what, part in learning.items():
        if all(_unlearned(now[name], began[name]) for name in now if part in name):
            raise TrainingError(f"{run}: {what} not learned: the weights are those of the beginning")
    for name, parameter in began.items():
        if not parameter.requires_grad and not torch.equal(now[name], parameter):
            raise TrainingError(f"{run}: '{name}' has changed, though it is frozen")
    for name, parameter in load_model(run, None).named_parameters():
        if not torch.equal(parameter, saved[name]):
            raise TrainingError(f"{run}: '{name}' is not in the checkpoint as it was trained")
