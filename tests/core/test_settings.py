"""One reading of settings, whether they were typed, stand in a file or come from Python."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from backdoorlab.core.canonical import MAX_SEED
from backdoorlab.core.errors import InputError
from backdoorlab.core.settings import check_seed, read_setting, read_settings, type_name


@pytest.mark.parametrize(
    ("hint", "value", "expected"),
    [
        (int, "10", 10),
        (int, "1e1", 10),
        (int, " +5 ", 5),
        (int, 10.0, 10),
        (int, np.int64(3), 3),
        (int, str(2**53 + 1), 2**53 + 1),
        (float, "1e-2", 0.01),
        (float, 1, 1.0),
        (float, np.float32(0.5), 0.5),
        (bool, "No", False),
        (bool, "off", False),
        (bool, 1, True),
        (str, "10", "10"),
        (int | None, "none", None),
        (float | None, None, None),
        (str | None, "null", None),
        (tuple[int, ...], "[1, 2]", (1, 2)),
        (tuple[str, ...], ["a", " b "], ("a", "b")),
        (tuple[float, ...] | None, "0.5,1", (0.5, 1.0)),
        (dict, {"a": 1}, {"a": 1}),
    ],
)
def test_values_get_the_type_of_the_field(hint: Any, value: object, expected: object) -> None:
    found = read_setting("toy", "field", value, hint)
    assert found == expected and type(found) is type(expected)


@pytest.mark.parametrize(
    ("hint", "value", "message"),
    [
        (int, "big", "of type int, got 'big'"),
        (int, "1e400", "of type int, got '1e400'"),
        (int, 2.5, "of type int, got 2.5"),
        (int, True, "of type int, got True"),
        (int, 2**63, "of type int, got 9223372036854775808"),
        (int, [1], r"of type int, got \[1\]"),
        (int, None, "of type int, got None"),
        (float, False, "of type float, got False"),
        (float, "much", "of type float, got 'much'"),
        (bool, "maybe", "true or false, got 'maybe'"),
        (bool, 7, "true or false, got 7"),
        (str, 5, "of type str, got 5"),
        (tuple[int, ...], 5, "a list of type int, got 5"),
        (tuple[int, ...], {1, 2}, "a list of type int, got"),
        (tuple[int, ...], "1,x", "of type int, got 'x'"),
        (tuple[bool, ...], ["yes", "maybe"], "true or false, got 'maybe'"),
    ],
)
def test_other_values_are_named_as_they_were_written(hint: Any, value: object, message: str) -> None:
    with pytest.raises(InputError, match=rf"^toy: field must be {message}") as caught:
        read_setting("toy", "field", value, hint)
    assert "\n" not in str(caught.value)


def test_unknown_names_get_the_nearest() -> None:
    assert read_settings("toy", {"rate": "0.5"}, {"rate": float}) == {"rate": 0.5}
    with pytest.raises(InputError, match=r"toy has no field 'rte'\. Did you mean 'rate'\? It has: rate, size"):
        read_settings("toy", {"rte": 1}, {"rate": float, "size": int})
    with pytest.raises(InputError, match="toy must be a mapping, got 5"):
        read_settings("toy", 5, {"rate": float})  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", [-1, MAX_SEED + 1, True, "1", 1.0, None])
def test_seeds_are_bounded(seed: object) -> None:
    check_seed("seed", MAX_SEED)
    with pytest.raises(InputError, match=f"the seed must be an integer from 0 to {MAX_SEED}, got"):
        check_seed("the seed", seed)


def test_types_in_words() -> None:
    assert [type_name(hint) for hint in (int, str | None)] == ["int", "str (optional)"]
