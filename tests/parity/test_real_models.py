"""Models that people use, split without a change to them: each must train as a plain loop does."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raypar import Plan, Trainer, parallelize
from raypar.randomness import mixed_seed
from raypar.splitting.choose import choose_split
from raypar.splitting.export import described
from raypar.splitting.model import ModelSpec, Split
from raypar.splitting.split import holders, split_model
from support import reference
from support.cases import name_of, sgd, slow
from support.engines import TOLERANCE, Engines, assert_equal
from support.models import WORDS, ResNet18, UNet, gpt2, llama, next_words

Words = tuple[dict[str, Tensor], Tensor]


def unet() -> nn.Module:
    return UNet()


def resnet() -> nn.Module:
    return ResNet18(width=4, classes=10)


def sgd_in_small_steps(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), lr=0.01)


def pixels(output: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(output, targets)


def images(steps: int, rows: int, channels: int, size: int) -> list[reference.Batch]:
    numbers = torch.Generator().manual_seed(1)
    return [
        (torch.randn(rows, channels, size, size, generator=numbers), torch.randint(0, 10, (rows,), generator=numbers))
        for _ in range(steps)
    ]


def sentences(rows: int, length: int, seed: int = 1) -> Words:
    """Words with padding behind some of them, and the words that follow."""
    numbers = torch.Generator().manual_seed(seed)
    words = torch.randint(1, WORDS, (rows, length + 1), generator=numbers)
    mask = (torch.arange(length) < torch.randint(1, length + 1, (rows, 1), generator=numbers)).long()
    return {"input_ids": words[:, :-1].contiguous(), "attention_mask": mask}, words[:, 1:].contiguous()


def split_by_count(build: Callable[[], nn.Module], stages: int, inputs: Any, split: list[str] | None = None) -> Split:
    """Where a model is split, each module that can begin a stage taken to cost the same."""
    spec = ModelSpec(build, next_words, sgd)
    return choose_split(spec, range(stages), split, inputs, lambda units: [1.0] * (len(units.names) + 1))


@functools.cache
def language_split(build: Callable[[], nn.Module], stages: int) -> Split:
    return split_by_count(build, stages, sentences(2, 8)[0])


def spec_of(build: Callable[[], nn.Module], split: Split, loss_fn: Any, seed: int = 0) -> ModelSpec:
    return ModelSpec(build, loss_fn, sgd, seed=seed, split=split)


PLANS = [
    Plan(pipeline=stages, microbatches=2, schedule=schedule) for stages in (2, 3) for schedule in ("1f1b", "gpipe")
]


# ---------------------------------------------------------------- images


@pytest.mark.parametrize("plan", PLANS, ids=name_of)
def test_a_unet_whose_skips_pass_over_stages_trains_as_a_plain_loop_does(plan: Plan) -> None:
    numbers = torch.Generator().manual_seed(1)
    batches = [(x, torch.randint(0, 3, (4, 16, 16), generator=numbers)) for x, _ in images(4, 4, 1, 16)]
    split = ["bottom", "up2"][: plan.pipeline - 1]
    engines = Engines(plan, spec_of(unet, split_by_count(unet, plan.pipeline, batches[0][0], split), pixels))
    losses = engines.train(batches)
    assert_equal(engines, losses, reference.train_on_microbatches(unet, batches, sgd, pixels, 1, 2))


@pytest.mark.parametrize("plan", PLANS, ids=name_of)
def test_a_resnet_trains_as_a_plain_loop_does_statistics_included(plan: Plan) -> None:
    batches = images(4, 8, 3, 64)  # batch statistics of four numbers would make much of the last bit
    split = split_by_count(resnet, plan.pipeline, batches[0][0])
    engines = Engines(plan, ModelSpec(resnet, F.cross_entropy, sgd_in_small_steps, split=split))
    losses = engines.train(batches)
    assert_equal(
        engines, losses, reference.train_on_microbatches(resnet, batches, sgd_in_small_steps, F.cross_entropy, 1, 2)
    )


def test_skips_go_straight_to_the_stage_that_uses_them() -> None:
    model = unet()
    parts = split_model(model, Split(("down2", "down3", "rise3", "rise2", "rise1")), 6)["train"]
    assert [set(part.sends) for part in parts] == [{1, 5}, {2, 4}, {3}, {4}, {5}, set()]


# ---------------------------------------------------------------- language models


def plain_training(
    build: Callable[[], nn.Module],
    batches: list[Words],
    microbatches: int,
    before: Callable[[int, int], None] | None = None,
) -> reference.Outcome:
    """One pass for each micro-batch, one after the other: sums over rows, divided once."""
    model = reference.seeded(build)
    optimizer = sgd(model)
    outcome = reference.Outcome()
    for step, (inputs, targets) in enumerate(batches, start=1):
        optimizer.zero_grad()
        total = 0.0
        cut = [tensor.tensor_split(min(len(targets), microbatches)) for tensor in (*inputs.values(), targets)]
        for number, (*values, words) in enumerate(zip(*cut, strict=True)):
            if before is not None:
                before(step, number)
            summed = next_words(model(**dict(zip(inputs, values, strict=True))), words) * len(words)
            (summed / len(targets)).backward()
            total += summed.item()
        optimizer.step()
        outcome.losses.append(total / len(targets))
    outcome.weights = model.state_dict()
    return outcome


def trained(plan: Plan, spec: ModelSpec, batches: list[Words]) -> tuple[Engines, list[float]]:
    engines = Engines(plan, spec)
    return engines, [engines.train_step(step, [batch])[0].loss for step, batch in enumerate(batches, start=1)]


def tied_gpt2() -> nn.Module:
    """The weights of its first layer are those of its last one, as the published models have it."""
    return gpt2(tied=True)


CASES = [
    (tied_gpt2, PLANS[0]),
    slow(gpt2, PLANS[3]),
    (llama, PLANS[1]),
    slow(llama, PLANS[2]),
]


def case_name(case: Any) -> str:
    return case.__name__ if callable(case) else name_of(case)


@pytest.mark.parametrize(("build", "plan"), CASES, ids=case_name)
def test_a_language_model_trains_as_a_plain_loop_does(build: Callable[[], nn.Module], plan: Plan) -> None:
    """Models of transformers, with batches of any size and length."""
    batches = [sentences(*size, seed=n) for n, size in enumerate([(6, 8), (4, 12), (6, 5), (1, 7)])]
    split = language_split(build, plan.pipeline)
    assert split.example is not None
    engines, losses = trained(plan, spec_of(build, split, next_words), batches)
    needed = plain_training(build, batches, plan.microbatch_count)
    assert_equal(engines, losses, needed)

    model = reference.seeded(build).eval()
    model.load_state_dict(needed.weights)
    inputs, targets = sentences(3, 9, seed=9)
    with torch.no_grad():
        output = model(**inputs)
    (found,) = engines.predict([inputs])
    assert type(found) is type(output)
    assert torch.allclose(found.logits, output.logits, atol=1e-5)
    loss, weight = engines.eval_step([(inputs, targets)])
    assert loss / weight == pytest.approx(next_words(output, targets).item(), abs=TOLERANCE)


@pytest.mark.slow
def test_without_a_mask_a_last_short_batch_may_come_down_to_single_rows() -> None:
    """What makes transformers' masks asks whether there is a single row, where no mask is given."""
    plan = Plan(pipeline=2, microbatches=4)
    batches = [({"input_ids": inputs["input_ids"]}, words) for inputs, words in (sentences(8, 6), sentences(5, 6))]
    split = split_by_count(llama, 2, batches[0][0], ["model.layers.1"])
    engines, losses = trained(plan, spec_of(llama, split, next_words), batches)
    assert_equal(engines, losses, plain_training(llama, batches, 4))


@pytest.mark.slow
def test_a_stage_of_a_language_model_may_have_no_parameters() -> None:
    plan = Plan(pipeline=3, microbatches=2)
    batches = [sentences(4, 6, seed=n) for n in range(3)]
    split = split_by_count(gpt2, 3, batches[0][0], ["transformer.drop", "transformer.h.0"])
    engines, losses = trained(plan, spec_of(gpt2, split, next_words), batches)
    assert [len(list(engine.part.module.parameters())) > 0 for engine in engines.all] == [True, False, True]
    assert_equal(engines, losses, plain_training(gpt2, batches, 2))


@pytest.mark.slow
def test_dropout_of_a_language_model_draws_by_step_and_microbatch() -> None:
    """In training; it stops in evaluation."""

    def build() -> nn.Module:
        return gpt2(dropout=0.3, attn_implementation="eager")

    plan = Plan(pipeline=2, microbatches=2)
    batches = [sentences(4, 6, seed=n) for n in range(3)]
    split = split_by_count(build, 2, batches[0][0], ["transformer.h.1"])
    engines, losses = trained(plan, spec_of(build, split, next_words, seed=0), batches)

    where: list[int] = [1, 0]

    def begin(step: int, number: int) -> None:
        where[:] = step, number
        torch.manual_seed(mixed_seed(0, step, number, 0))

    def seeded_at_the_border() -> nn.Module:
        model = build()
        model.transformer.h[1].register_forward_pre_hook(  # type: ignore[index, union-attr]
            lambda *_: torch.manual_seed(mixed_seed(0, *where, 1)) and None
        )
        return model

    needed = plain_training(seeded_at_the_border, batches, 2, begin)
    assert_equal(engines, losses, needed)
    first, second = (engines.predict([batches[0][0]])[0].logits for _ in range(2))
    assert torch.equal(first, second)
    assert plain_training(lambda: gpt2(), batches, 2).losses != pytest.approx(losses, abs=1e-3)


@pytest.mark.parametrize("build", [unet, resnet, slow(gpt2), llama])
def test_every_layer_is_owned_by_exactly_one_stage(build: Callable[[], nn.Module]) -> None:
    model = build()
    is_language = build in (gpt2, llama)
    split = (
        language_split(build, 3)
        if is_language
        else split_by_count(build, 3, images(1, 2, 1 if build is unet else 3, 32)[0][0])
    )
    held = holders(model, list(split_model(model, split, 3).values()))
    assert list(held) == [name for name, _ in (*model.named_parameters(), *model.named_buffers())]
    assert all(len(stages) == 1 for stages in held.values())
    assert {stages[0] for stages in held.values()} == {0, 1, 2}
    for name, module in model.named_modules():
        if not list(module.children()):
            assert len({held[f"{name}.{own}"][0] for own, _ in module.named_parameters()}) <= 1


@pytest.mark.slow
def test_a_part_of_a_language_model_has_the_types_names_and_hooks_of_the_whole_one() -> None:
    calls: list[tuple[str, bool]] = []

    def build() -> nn.Module:
        model = gpt2()
        for name, module in model.named_modules():
            if type(module) is nn.LayerNorm or (name.startswith("transformer.h.") and name.count(".") == 2):
                module.register_forward_hook(lambda module, *_, name=name: calls.append((name, module.training)))
        return model

    def optimizer(module: nn.Module) -> torch.optim.Optimizer:
        norms = {p for m in module.modules() if isinstance(m, nn.LayerNorm) for p in m.parameters()}
        other = [p for p in module.parameters() if p not in norms]
        return torch.optim.SGD([{"params": list(norms), "lr": 0.0}, {"params": other}], lr=0.1)

    plan = Plan(pipeline=2, microbatches=2)
    inputs, targets = sentences(4, 6)
    split = split_by_count(build, 2, inputs, ["transformer.h.1"])
    calls.clear()
    engines = Engines(plan, ModelSpec(build, next_words, optimizer, split=split))
    assert calls == []
    before = engines.weights()
    engines.train_step(1, [(inputs, targets)])
    after = engines.weights()
    names = ["transformer.ln_f", *(f"transformer.h.{n}{part}" for n in range(2) for part in ("", ".ln_1", ".ln_2"))]
    assert sorted(calls) == sorted((name, True) for name in names for _ in range(2))
    assert torch.equal(before["transformer.ln_f.weight"], after["transformer.ln_f.weight"])
    assert not torch.equal(before["transformer.h.1.mlp.c_fc.weight"], after["transformer.h.1.mlp.c_fc.weight"])
    calls.clear()
    engines.predict([inputs])
    assert sorted(calls) == sorted((name, False) for name in names for _ in range(2))


def test_a_language_model_that_keeps_a_cache_is_refused_with_what_to_set() -> None:
    with pytest.raises(Exception, match=r"returns a value of type DynamicCache.*config\.use_cache=False") as caught:
        split_by_count(lambda: llama(use_cache=True), 3, sentences(2, 8)[0])
    assert type(caught.value).__name__ == "SplitError"


def train_gpt2(config: dict[str, Any]) -> None:
    inputs, _ = sentences(2, 8)
    replica = parallelize(
        gpt2, loss_fn=next_words, optimizer=sgd, example_inputs=inputs, split=config["split"], max_grad_norm=None
    )
    batches = [sentences(4, length, seed=length) for length in (8, 6, 9)]
    config["losses"] += [replica.train_step(*batch).loss for batch in batches]
    config["weights"].update(replica.state_dict())


@pytest.mark.usefixtures("even_times")
def test_gpt2_is_split_and_trained_by_nothing_but_example_inputs(tmp_path: Any) -> None:
    config: dict[str, Any] = {"losses": [], "weights": {}, "split": None}
    Trainer(train_gpt2, plan=Plan(pipeline=2, microbatches=2), train_loop_config=config, local=True).fit()
    needed = plain_training(gpt2, [sentences(4, length, seed=length) for length in (8, 6, 9)], 2)
    assert config["losses"] == pytest.approx(needed.losses, abs=TOLERANCE)
    assert reference.worst_difference(config["weights"], needed.weights) <= TOLERANCE


def test_the_inputs_that_the_graph_needs_are_described_without_their_values() -> None:
    assert language_split(gpt2, 2).example == described(sentences(2, 8, seed=5)[0])
