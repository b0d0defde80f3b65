from __future__ import annotations

import itertools
import random

import numpy as np
import torch
from torch.nn.functional import dropout

from raypar.randomness import mixed_seed, restore_state, save_state, seed_loop, seed_pass

CPU = torch.device("cpu")


def test_one_number_is_mixed_as_splitmix64_does():
    # the first outputs of splitmix64 (Steele, Lea and Flood 2014) from the states 0 and 1234567, without their last bit
    assert mixed_seed(0) == 0xE220A8397B1DCDAF >> 1
    assert mixed_seed(1234567) == 6457827717110365317 >> 1


def test_every_step_micro_batch_and_stage_has_a_seed_of_its_own():
    seeds = {mixed_seed(*numbers) for numbers in itertools.product(range(3), range(20), range(20), range(8))}
    assert len(seeds) == 3 * 20 * 20 * 8


def test_a_seed_depends_on_the_order_and_the_count_of_the_numbers():
    assert len({mixed_seed(), mixed_seed(0), mixed_seed(0, 0), mixed_seed(0, 1), mixed_seed(1, 0)}) == 5


def test_any_whole_numbers_make_a_seed_that_torch_takes():
    for numbers in [(-1,), (2**70, 3), (2**63 - 1, 2**63 - 1)]:
        assert 0 <= mixed_seed(*numbers) < 2**63
        torch.Generator().manual_seed(mixed_seed(*numbers))


def drawn(seed: int, step: int, microbatch: int, stage: int) -> list[float]:
    seed_pass(CPU, seed, step, microbatch, stage)
    kept: list[float] = dropout(torch.ones(64), 0.5).tolist()
    return kept


def test_a_pass_that_is_repeated_drops_the_same_values_and_another_pass_drops_others():
    kept = save_state()
    first = drawn(0, 3, 2, 1)
    torch.rand(7)
    assert drawn(0, 3, 2, 1) == first
    assert all(drawn(*other) != first for other in [(1, 3, 2, 1), (0, 4, 2, 1), (0, 3, 1, 1), (0, 3, 2, 0)])
    restore_state(kept)


def test_python_and_numpy_draw_other_numbers_in_each_pass_and_the_same_when_it_is_repeated():
    """They were once given back but not seeded: a model that drops layers by random.random() dropped the same ones in
    every step."""

    def numbers(step: int) -> tuple[float, float]:
        seed_pass(CPU, 0, step, 0, 0)
        return random.random(), float(np.random.rand())

    kept = save_state()
    assert numbers(1) == numbers(1)
    assert len({numbers(step) for step in range(20)}) == 20
    restore_state(kept)


def test_the_global_generators_go_on_where_they_were_kept():
    def numbers() -> tuple[list[float], float, float]:
        return torch.rand(3).tolist(), float(np.random.rand()), random.random()

    before = save_state()
    expected = numbers()
    restore_state(before)
    kept = save_state()
    seed_pass(CPU, 0, 1, 2, 3)
    np.random.seed(1)
    random.seed(2)
    restore_state(kept)
    assert numbers() == expected


def test_the_loops_of_replicas_draw_other_numbers_each_and_the_same_in_every_run():
    def drawn(replica: int) -> tuple[float, float, float]:
        seed_loop(replica)
        return float(torch.rand(())), float(np.random.rand()), random.random()

    kept = save_state()
    assert drawn(0) == drawn(0)
    assert len({value for replica in range(3) for value in drawn(replica)}) == 9
    restore_state(kept)
