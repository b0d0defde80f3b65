from __future__ import annotations

from raypar.planning.place import Place


def test_a_place_prints_as_an_address():
    assert str(Place(1, (2,), 0)) == "replica 1, stage 2, micro-batch 0"
    assert str(Place(1, (0, 2))) == "replica 1, stages 0, 2"
    assert str(Place(3)) == "replica 3"


def test_an_error_names_the_first_stage():
    assert Place(1, (2, 5)).stage == 2
    assert Place(1).stage is None
