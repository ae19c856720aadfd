"""Schedules: closed forms."""

import pytest

from global_kd import Schedule


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        # progress 0, .25, .5, 1
        (Schedule("constant"), (1, 1, 1, 1)),
        (Schedule("linear"), (1, 0.75, 0.5, 0)),
        (Schedule("cosine"), (1, (1 + 2**-0.5) / 2, 0.5, 0)),
        (Schedule("constant", stop=0.5), (1, 1, 1, 0)),  # a stop switches off
        (Schedule("linear", stop=0.5), (1, 0.5, 0, 0)),
        (Schedule("linear", start=0.5), (0, 0, 1, 0)),  # a start epoch
        (Schedule("constant", warmup=0.5), (0, 0.5, 1, 1)),
        (Schedule("linear", warmup=0.25), (0, 1, 2 / 3, 0)),  # up to 1, and down from there
        (Schedule("cosine", start=0.25, warmup=0.25), (0, 0, 1, 0)),
        (Schedule("linear", warmup=0.25, steps=3), (0, 1, 2 / 3, 0)),
    ],
)
def test_closed_forms(schedule, expected):
    assert [schedule(p) for p in (0, 0.25, 0.5, 1)] == pytest.approx(expected)


def test_steps_are_the_released_epochs():
    epochs = 24
    schedule = Schedule("linear", steps=epochs)
    for epoch in range(epochs):
        for iteration in (0, 3, 6):
            progress = (epoch + iteration / 7) / epochs
            assert schedule(progress) == pytest.approx(1 - epoch / epochs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decay": "exponential"}, "decay: expected one of"),
        ({"start": 0.6, "stop": 0.5}, "start, stop: expected"),
        ({"warmup": 2.0}, "warmup: expected"),
        ({"warmup": 1.0}, "warmup: expected less than"),
        ({"steps": 0}, "steps: expected"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        Schedule(**options)


@pytest.mark.parametrize("k", range(24))
@pytest.mark.parametrize("option", ["start", "warmup"])
def test_steps_after_a_start_or_warm_up_of_whole_epochs(option, k):
    """Epoch k + j of 24: rounding may not push a step into the epoch before."""
    schedule = Schedule("linear", steps=24 - k, **{option: k / 24})
    for j in range(24 - k):
        for iteration in (0, 3):
            progress = (k + j + iteration / 7) / 24
            assert schedule(progress) == pytest.approx(1 - j / (24 - k)), (j, iteration)
    assert k == 0 or schedule((k - 0.5) / 24) == pytest.approx(
        0 if option == "start" else (k - 0.5) / k
    )
