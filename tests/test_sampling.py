"""Filters, keyed noise and the law of what is picked, each against a slow or exact reference."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from invariants import ALPHA, Violation, follows, pick, slow_probabilities
from scipy.stats import chisquare, kstest

from foretoken.errors import ConfigError
from foretoken.sampling import Sampling, filtered, gumbel

LOGITS = st.lists(st.integers(-64, 64).map(lambda x: x / 8), min_size=1, max_size=9)  # equal, or clearly not
SAMPLINGS = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.3, 0.7, 1.0, 1.9]),
    top_k=st.integers(0, 10),
    top_p=st.sampled_from([0.05, 0.3, 0.61, 0.9, 0.99, 1.0]),
    min_p=st.sampled_from([0.0, 0.02, 0.13, 0.4, 1.0]),
)


# Filters


@given(st.lists(LOGITS, min_size=1, max_size=3), SAMPLINGS)
def test_filters_equal_slow_reference(rows: list[list[float]], sampling: Sampling) -> None:
    width = min(len(row) for row in rows)
    logits = torch.tensor([row[:width] for row in rows], dtype=torch.float64)
    assume(sampling.temperature > 0)
    found = (filtered(logits, sampling) / sampling.temperature).softmax(-1)
    for row, p in zip(logits.tolist(), found.tolist(), strict=True):
        wanted = slow_probabilities(row, sampling)
        # A threshold met to the last bit may fall either way.
        near = slow_probabilities(row, Sampling(sampling.temperature, sampling.top_k))
        sums = [sum(sorted(near, reverse=True)[:k]) for k in range(1, width + 1)]
        assume(all(abs(total - sampling.top_p) > 1e-9 for total in sums) or sampling.top_p == 1)
        kept = slow_probabilities(row, Sampling(sampling.temperature, sampling.top_k, sampling.top_p))
        assume(all(abs(q - sampling.min_p * max(kept)) > 1e-9 for q in kept if 0 < q < max(kept)))
        assert p == pytest.approx(wanted, abs=1e-9)


def test_filters_worked_example() -> None:
    logits = torch.tensor([0.5, 0.25, 0.15, 0.1], dtype=torch.float64).log()

    def kept(**fields: float) -> list[int]:
        return torch.isfinite(filtered(logits, Sampling(**{"temperature": 1.0, **fields}))).nonzero()[:, 0].tolist()

    assert kept() == [0, 1, 2, 3]
    assert kept(top_k=2) == [0, 1]
    assert kept(top_p=0.4) == [0]  # the first that reaches it stays
    assert kept(top_p=0.6) == [0, 1]
    assert kept(top_p=0.8) == [0, 1, 2]
    assert kept(min_p=0.25) == [0, 1, 2]  # at least 0.125
    assert kept(min_p=1.0) == [0]
    # Each on what the one before left: of three tokens the first has 0.5 / 0.9 = 0.556, all three are needed for 0.84.
    assert kept(top_k=3, top_p=0.84) == [0, 1, 2]
    assert kept(top_k=3, top_p=0.83) == [0, 1]
    # At temperature 0.5 probabilities are squared: 0.725, 0.181, 0.065, 0.029.
    assert kept(temperature=0.5, top_p=0.7) == [0]
    assert kept(temperature=2.0, top_p=0.7) == [0, 1, 2]
    ties = torch.tensor([1.0, 3.0, 1.0, 0.0])
    assert torch.isfinite(filtered(ties, Sampling(1.0, top_k=2))).tolist() == [True, True, True, False]


@given(LOGITS, SAMPLINGS, st.integers(-(2**63), 2**63 - 1))
def test_greedy_is_argmax_whatever_the_filters(row: list[float], sampling: Sampling, seed: int) -> None:
    logits = torch.tensor([[row]])
    greedy = Sampling(0.0, sampling.top_k, sampling.top_p, sampling.min_p)
    assert pick(logits, torch.tensor([[5]]), torch.tensor([[seed]]), greedy).item() == logits.argmax().item()
    # Greedy is the limit, not a branch: so little noise changes only ties.
    assume(len(row) == 1 or sorted(row)[-1] - sorted(row)[-2] > 1e-3)
    cold = Sampling(1e-6, sampling.top_k, sampling.top_p, sampling.min_p)
    assert pick(logits, torch.tensor([[5]]), torch.tensor([[seed]]), cold).item() == logits.argmax().item()


@given(LOGITS, SAMPLINGS, st.integers(0, 2**40), st.integers(0, 10**6))
def test_a_filtered_token_is_never_picked(row: list[float], sampling: Sampling, seed: int, start: int) -> None:
    positions = torch.arange(start, start + 50)
    tokens = pick(torch.tensor(row, dtype=torch.float64).expand(50, -1), positions, torch.tensor(seed), sampling)
    allowed = torch.isfinite(filtered(torch.tensor(row, dtype=torch.float64), sampling))
    assert allowed[tokens].all()


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": -0.1}, {"temperature": math.nan}, {"temperature": math.inf}, {"top_k": -1}, {"top_p": 0.0},
        {"top_p": 1.1}, {"top_p": math.nan}, {"min_p": -0.1}, {"min_p": 1.01}, {"min_p": math.nan},
    ],
)  # fmt: skip
def test_bad_values_are_one_line(fields: dict[str, float]) -> None:
    with pytest.raises(ConfigError) as error:
        Sampling(**fields)
    ((name, value),) = fields.items()
    assert str(error.value).startswith(f"{name} = {value} must ")
    assert "\n" not in str(error.value)


# Noise


def slow_mix(x: int) -> int:
    """splitmix64 as published, on integers without a width."""
    x = (x + 0x9E3779B97F4A7C15) % 2**64
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return x ^ (x >> 31)


def slow_gumbel(seed: int, position: int, token: int) -> float:
    key = slow_mix(slow_mix(slow_mix(seed % 2**64) ^ position) ^ token)
    return -math.log(-math.log(((key >> 12) + 0.5) / 2**52))


def test_splitmix64_known_answers() -> None:
    # The generator's first outputs from state 0, as every implementation of it lists them.
    assert [slow_mix(i * 0x9E3779B97F4A7C15 % 2**64) for i in range(3)] == [
        0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F,
    ]  # fmt: skip


@given(st.integers(-(2**63), 2**63 - 1), st.integers(0, 2**40))
def test_gumbel_equals_slow_reference(seed: int, position: int) -> None:
    found = gumbel(torch.tensor(seed), torch.tensor(position), 4)
    assert found.tolist() == pytest.approx([slow_gumbel(seed, position, token) for token in range(4)], rel=1e-12)


def test_gumbel_is_a_pure_function() -> None:
    seeds, positions = torch.tensor([[3], [-8], [3]]), torch.tensor([[5, 6, 7], [0, 1, 2], [7, 5, 900]])
    batch = gumbel(seeds, positions, 6)
    assert batch.shape == (3, 3, 6)
    for b in range(3):
        for t in range(3):
            assert torch.equal(batch[b, t], gumbel(seeds[b, 0], positions[b, t], 6))
    assert torch.equal(batch[0, 0], batch[2, 1])  # the same seed and position in another row and place
    assert torch.equal(gumbel(seeds.flip(0), positions.flip(0), 6), batch.flip(0))
    assert torch.equal(gumbel(seeds, positions, 3), batch[..., :3])  # of a token, not of the vocabulary
    torch.manual_seed(1)
    assert torch.equal(gumbel(seeds, positions, 6), batch)
    assert not torch.equal(gumbel(torch.tensor(3), torch.tensor(5), 6), gumbel(torch.tensor(5), torch.tensor(3), 6))


@pytest.mark.parametrize("along", ["token", "position", "seed"])
def test_noise_is_uniform_and_independent(along: str) -> None:
    keys = torch.arange(1 << 15)
    noise = {
        "token": lambda: gumbel(torch.tensor(1), torch.tensor(2), len(keys)),
        "position": lambda: gumbel(torch.tensor(1), keys, 3)[:, 2],
        "seed": lambda: gumbel(keys, torch.tensor(1), 3)[:, 2],
    }[along]().numpy()
    count = len(noise)
    # Gumbel's mean is Euler's constant, its variance pi^2 / 6 and its fourth central moment 5.4 variances squared.
    variance = math.pi**2 / 6
    assert abs(noise.mean() - 0.5772156649) < 4 * math.sqrt(variance / count)
    assert abs(noise.var() - variance) < 4 * variance * math.sqrt(4.4 / count)
    uniform = np.exp(-np.exp(-noise))
    assert kstest(uniform, "uniform").pvalue > ALPHA
    cells = (uniform * 16).astype(int)
    for lag in (1, 2, 16):  # neighbours, as the tokens of a block and the seeds of a batch are
        pairs = np.bincount(cells[:-lag] * 16 + cells[lag:], minlength=256)
        assert chisquare(pairs).pvalue > ALPHA
    last_bits = np.bincount((uniform * 2**20).astype(int) % 16, minlength=16)
    assert chisquare(last_bits).pvalue > ALPHA


# The law of a pick


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(1.0), Sampling(0.5), Sampling(2.0), Sampling(1.0, top_k=3), Sampling(0.8, top_p=0.7),
        Sampling(1.3, 4, 0.95, 0.2),
    ],
    ids=lambda s: f"{s.temperature}-{s.top_k}-{s.top_p}-{s.min_p}",
)  # fmt: skip
@pytest.mark.parametrize("along", ["position", "seed"])
def test_pick_follows_filtered_softmax(sampling: Sampling, along: str) -> None:
    logits = torch.tensor([0.3, -1.2, 1.1, 0.4, -0.1], dtype=torch.float64)
    keys, one = torch.arange(20_000), torch.tensor(7)
    positions, seeds = (keys, one) if along == "position" else (one.expand(20_000), keys)
    tokens = pick(logits.expand(20_000, -1), positions, seeds, sampling)
    counts = np.bincount(tokens.numpy(), minlength=5)
    follows(counts, np.array(slow_probabilities(logits.tolist(), sampling)))
    # Positive control: the law at a temperature 30 % higher is told apart.
    other = Sampling(sampling.temperature * 1.3, sampling.top_k, sampling.top_p, sampling.min_p)
    with pytest.raises(Violation):
        follows(counts, np.array(slow_probabilities(logits.tolist(), other)))


def test_chi_square_pools_rare_cells_and_forbids_impossible_ones() -> None:
    law = np.array([0.5, 0.4995, 0.0005, 0.0])
    follows(np.array([502, 497, 1, 0]), law)
    with pytest.raises(Violation, match="impossible"):
        follows(np.array([502, 496, 1, 1]), law)
    with pytest.raises(Violation):
        follows(np.array([502, 482, 16, 0]), law)


# Acceptance
