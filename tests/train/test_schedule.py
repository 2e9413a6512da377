"""The learning rate over a run."""

import math
from functools import partial

import pytest
from schedule import lr_factor

report = partial(lr_factor, steps_per_epoch=390, epochs=200, warmup_epochs=0, schedule="step")


def test_the_report_divides_after_80_and_160_epochs() -> None:
    factors = [report(step) for step in range(200 * 390)]
    assert factors[0] == 1.0
    changes = [i for i in range(1, len(factors)) if factors[i] != factors[i - 1]]
    assert changes == [80 * 390, 160 * 390]
    assert factors[80 * 390] == pytest.approx(0.1)
    assert factors[-1] == pytest.approx(0.01)


def test_warmup_rises_a_little_at_every_step_and_meets_the_schedule() -> None:
    factors = [
        lr_factor(s, steps_per_epoch=10, epochs=20, warmup_epochs=5, schedule="step")
        for s in range(60)
    ]
    assert factors[:50] == pytest.approx([(s + 1) / 50 for s in range(50)])
    assert factors[50:] == [1.0] * 10


def test_cosine_falls_from_one_to_nothing_after_the_warmup() -> None:
    factors = [
        lr_factor(s, steps_per_epoch=10, epochs=10, warmup_epochs=1, schedule="cosine")
        for s in range(100)
    ]
    assert factors[10] == 1.0
    assert factors[55] == pytest.approx(0.5)
    assert factors[99] == pytest.approx(0.5 * (1 + math.cos(math.pi * 89 / 90)))
    assert all(a > b for a, b in zip(factors[10:], factors[11:], strict=False))
