"""Content keys."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clsnf.core.hashing import content_key, set_key

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text()
)
CONTENT = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)


def backwards(content: Any) -> Any:
    """The same content with the keys of every mapping in the opposite order."""
    if isinstance(content, dict):
        return {key: backwards(content[key]) for key in reversed(content)}
    return [backwards(value) for value in content] if isinstance(content, list) else content


@given(st.dictionaries(st.text(), CONTENT, max_size=5))
def test_a_key_does_not_depend_on_the_order_of_names(content: dict[str, Any]) -> None:
    assert content_key(content) == content_key(backwards(content))


@given(CONTENT, CONTENT)
def test_different_content_has_different_keys(one: Any, other: Any) -> None:
    assert (content_key(one) == content_key(other)) == (
        json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)
    )


def test_a_key_is_the_same_on_every_machine() -> None:
    # sha256 of {"a":"\\u00fc","b":[1,2.5,null]}, worked out by sha256sum
    assert (
        content_key({"b": [1, 2.5, None], "a": "ü"}) == "703dceec79c30480a5c3da98f5873d45349c6685"
    )


def test_a_set_s_key_depends_on_its_members_not_on_their_order() -> None:
    assert set_key(["a", "b"]) == set_key(["b", "a"]) != set_key(["a", "c"])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_have_no_key(value: float) -> None:
    with pytest.raises(ValueError, match="JSON"):
        content_key({"a": value})
