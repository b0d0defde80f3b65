from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
import torch
from torch.nn.functional import dropout

from raypar.randomness import kept, mixed_seed, seed_all, seed_loop, seed_pass

CPU = torch.device("cpu")


def test_mixed_seed_is_splitmix64():
    # the first outputs of splitmix64 (Steele, Lea and Flood 2014) from the states 0 and 1234567, without their last bit
    assert mixed_seed(0) == 0xE220A8397B1DCDAF >> 1
    assert mixed_seed(1234567) == 6457827717110365317 >> 1


def test_each_pass_has_its_own_seed():
    seeds = {mixed_seed(*numbers) for numbers in itertools.product(range(3), range(20), range(20), range(8))}
    assert len(seeds) == 3 * 20 * 20 * 8


def test_order_and_count_of_numbers_matter():
    assert len({mixed_seed(), mixed_seed(0), mixed_seed(0, 0), mixed_seed(0, 1), mixed_seed(1, 0)}) == 5


def test_torch_takes_every_seed():
    for numbers in [(-1,), (2**70, 3), (2**63 - 1, 2**63 - 1)]:
        assert 0 <= mixed_seed(*numbers) < 2**63
        torch.Generator().manual_seed(mixed_seed(*numbers))


def drawn(seed: int, step: int, microbatch: int, stage: int) -> list[float]:
    seed_pass(CPU, seed, step, microbatch, stage)
    values: list[float] = dropout(torch.ones(64), 0.5).tolist()
    return values


def numbers() -> tuple[float, float, float]:
    return float(torch.rand(())), float(np.random.rand()), random.random()


def test_a_repeated_pass_drops_the_same():
    with kept():
        first = drawn(0, 3, 2, 1)
        torch.rand(7)
        assert drawn(0, 3, 2, 1) == first
        assert all(drawn(*other) != first for other in [(1, 3, 2, 1), (0, 4, 2, 1), (0, 3, 1, 1), (0, 3, 2, 0)])


def test_a_pass_seeds_all_generators():
    """Python's and NumPy's were once restored but not seeded: a model that drops layers by random.random() dropped the
    same ones in every step."""

    def in_step(step: int) -> tuple[float, float, float]:
        seed_pass(CPU, 0, step, 0, 0)
        return numbers()

    with kept():
        assert in_step(1) == in_step(1)
        assert len({value for step in range(20) for value in in_step(step)}) == 60


def test_seed_all_seeds_all_generators():
    with kept():
        seed_all(2**40 + 1)
        first = numbers()
        seed_all(2**40 + 1, CPU)
        assert numbers() == first
        seed_all(2**40 + 2)
        assert not set(numbers()) & set(first)


def test_kept_restores_the_generators():
    with kept():
        expected = numbers()

    def fail() -> None:
        seed_pass(CPU, 0, 1, 2, 3)
        raise KeyError

    with pytest.raises(KeyError), kept():
        fail()
    with kept():
        assert numbers() == expected


def test_each_replica_s_loop_draws_its_own_numbers():
    def of_replica(replica: int) -> tuple[float, float, float]:
        seed_loop(replica)
        return numbers()

    with kept():
        assert of_replica(0) == of_replica(0)
        assert len({value for replica in range(3) for value in of_replica(replica)}) == 9
