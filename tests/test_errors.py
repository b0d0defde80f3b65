from __future__ import annotations

import pickle
import re
import traceback

import pytest

import raypar
from raypar import errors
from raypar.errors import NonFiniteError, RayparError, RunError, near_names


def subclasses(cls: type[RayparError]) -> list[type[RayparError]]:
    return [cls, *(deeper for child in cls.__subclasses__() for deeper in subclasses(child))]


ALL = [cls for cls in vars(errors).values() if isinstance(cls, type) and issubclass(cls, RayparError)]

each_error = pytest.mark.parametrize("cls", ALL, ids=lambda cls: cls.__name__)


def drawn_tree(text: str) -> dict[str, str]:
    """Each class of a tree drawn with ├── and └──, and the class that it hangs from."""
    parents: dict[str, str] = {}
    above: list[tuple[int, str]] = []
    for line in text.splitlines():
        found = re.match(r"(?P<indent>\s+(?:[│ ]*[├└]── )?)(?P<name>\w+Error)\b", line)
        if found is None:
            continue
        depth, name = len(found["indent"]), found["name"]
        above = [(other, parent) for other, parent in above if other < depth]
        if above:
            parents[name] = above[-1][1]
        above.append((depth, name))
    return parents


def test_the_drawn_tree_is_the_real_one():
    assert errors.__doc__ is not None
    real = {cls.__name__: cls.__mro__[1].__name__ for cls in ALL if cls is not RayparError}
    assert drawn_tree(errors.__doc__) == real


@each_error
def test_an_error_survives_pickling(cls: type[RayparError]):
    """With its message and attributes."""
    attributes = {"replica": 1, "stage": 2, "step": 3, "checkpoint": "/runs/a", "note": ("any", "value")}
    error = cls("stage 2 found 3, needed 4", **attributes)
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is cls
    assert (str(again), again.message, again.args) == (error.message, error.message, error.args)
    assert {name: getattr(again, name) for name in attributes} == attributes


@each_error
def test_an_error_says_what_it_means_in_its_docstring(cls: type[RayparError]):
    assert (cls.__doc__ or "").strip().endswith((".", "one."))
    assert "__doc__" in cls.__dict__


@each_error
def test_an_error_is_a_name_of_raypar(cls: type[RayparError]):
    assert getattr(raypar, cls.__name__) is cls
    assert cls.__name__ in raypar.__all__
    assert traceback.format_exception_only(cls("found 1")) == [f"raypar.{cls.__name__}: found 1\n"]
    assert f"craypar\n{cls.__name__}\n".encode() in pickle.dumps(cls("found 1"), protocol=0)


@pytest.mark.parametrize("name", sorted(set(raypar.__all__) - {"errors"}))
def test_public_names_are_raypar_s(name: str):
    public = getattr(raypar, name)
    assert public.__module__ == "raypar"
    assert pickle.loads(pickle.dumps(public)) is public


@each_error
def test_the_message_is_the_whole_text_of_an_error(cls: type[RayparError]):
    assert str(cls("found 1, needed 2", step=1, stage=0)) == "found 1, needed 2"


def test_notes_of_an_error_survive_pickling():
    error = RunError("replica 0: lost", replica=0)
    error.add_note("raised on 10.0.0.1")
    assert pickle.loads(pickle.dumps(error)).__notes__ == ["raised on 10.0.0.1"]


def test_only_run_errors_are_retryable():
    assert {cls.__name__ for cls in ALL if cls.retryable} == {cls.__name__ for cls in subclasses(RunError)}


def test_a_run_error_has_a_place():
    """Unknown by default."""
    assert (RunError("lost").replica, RunError("lost").stage) == (None, None)
    assert (RunError("lost", replica=1, stage=2).replica, RunError("lost", replica=1, stage=2).stage) == (1, 2)


def test_a_non_finite_error_names_the_checkpoint():
    error = NonFiniteError("the loss became nan at step 8.", step=8, stage=1)
    assert error.checkpoint is None
    named = error.with_checkpoint("/runs/digits/checkpoint_00000007")
    assert (named.step, named.stage, named.checkpoint) == (8, 1, "/runs/digits/checkpoint_00000007")
    assert str(named) == (
        "the loss became nan at step 8. The last committed step (7) is saved in /runs/digits/checkpoint_00000007."
    )


FIRST_TEN = "known: 'k0', 'k1', 'k2', 'k3', 'k4', 'k5', 'k6', 'k7', 'k8', 'k9', … (12 in all)"


@pytest.mark.parametrize(
    ("wanted", "known", "text"),
    [
        ("1f1p", ["gpipe", "1f1b"], "did you mean '1f1b'?"),
        ("conv", ["fc1", "convolve", "conv1"], "did you mean 'conv1' or 'convolve'?"),
        ("zzz", ["gpipe", "1f1b"], "known: 'gpipe', '1f1b'"),
        ("zzz", [f"k{n}" for n in range(12)], FIRST_TEN),
    ],
)
def test_near_names_or_the_first_ten(wanted: str, known: list[str], text: str):
    assert near_names(wanted, known) == text


def test_near_names_takes_any_iterable():
    assert near_names("trian", iter(["train", "test"])).startswith("did you mean 'train'")
