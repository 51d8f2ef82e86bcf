"""One rule for the types of settings and arguments."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy
import pytest

from lipfast import config
from lipfast.errors import ConfigError, InputError


@dataclass(frozen=True)
class Settings:
    count: int = 1
    share: float = 0.5
    name: str | None = None
    kind: Literal["a", "b"] = "a"
    several: tuple[int, ...] = ()
    more: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        config.check_fields(self)


class Picture:
    pass


@config.checks_types
def use(picture: Picture, sizes: Sequence[int] | int = 3, **rest: Any) -> tuple[Any, ...]:
    return picture, sizes, rest


def test_numpys_numbers_and_lists_become_plain_and_equal_settings_are_equal():
    given = Settings(numpy.int64(2), numpy.float32(0.1), "x", "b", [numpy.uint8(4)], {"a": [numpy.float64(2)]})
    plain = Settings(2, 0.1, "x", "b", (4,), {"a": [2.0]})
    assert given == plain
    assert json.dumps(vars(given)) == json.dumps(vars(plain))
    assert json.dumps(vars(Settings(share=1))) == json.dumps(vars(Settings(share=1.0)))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"count": 1.0}, "Settings.count must be a whole number, got 1.0"),
        ({"count": True}, "Settings.count must be a whole number, got True"),
        ({"count": numpy.float64(2)}, "Settings.count must be a whole number, got 2.0"),
        ({"share": "0.5"}, "Settings.share must be a number, got '0.5'"),
        ({"name": b"x"}, "Settings.name must be a text or None, got bytes"),
        ({"kind": "c"}, "Settings.kind must be one of a, b, got 'c'"),
        ({"several": "12"}, "Settings.several must be a list, each entry a whole number, got '12'"),
        ({"several": [1, "2"]}, r"Settings.several must be .*, got \[1, '2'\]"),
        ({"more": [1]}, r"Settings.more must be a mapping, got \[1\]"),
        ({"more": {1: 2}}, "Settings.more must be a mapping, got {1: 2}"),
    ],
)
def test_settings_of_another_type_are_named(wrong, message):
    with pytest.raises(ConfigError, match=message):
        Settings(**wrong)


def test_arguments_are_checked_and_passed_on():
    picture = Picture()
    assert use(picture, [1, 2], other="x") == (picture, [1, 2], {"other": "x"})
    with pytest.raises(InputError, match="use: picture must be a Picture, got the class Picture"):
        use(Picture)
    with pytest.raises(ConfigError, match="use: sizes must be a list, each entry a whole number or a whole number"):
        use(picture, "large")
    with pytest.raises(TypeError, match="missing a required argument"):
        use()


def test_json_has_null_for_what_is_no_finite_number():
    text = config.to_json({"psnr": float("inf"), "nested": [{"a": float("nan")}, (1.5, None, "Infinity", True)]})
    assert json.loads(text) == {"psnr": None, "nested": [{"a": None}, [1.5, None, "Infinity", True]]}
