from __future__ import annotations

import json

import pytest

from manyheads.core.errors import DataError
from manyheads.timeseries.covariates import Covariates, Role

WHOLE = Covariates(
    past=Role(("wind", "rain")),
    future=Role(("price",), {"day": ("fri", "sat"), "promo": ("no",)}),
    static=Role((), {"shop": ("a", "b", "c")}),
)


def test_sizes_are_flat_plain_values() -> None:
    assert WHOLE.sizes() == {
        "past": 2,
        "past_categories": [],
        "future": 1,
        "future_categories": [3, 2],
        "static": 0,
        "static_categories": [4],
    }
    assert list(Covariates().sizes().values()) == [0, [], 0, [], 0, []]


def test_columns_come_numeric_first_role_by_role() -> None:
    assert WHOLE.columns == ("wind", "rain", "price", "day", "promo", "shop")
    assert WHOLE.numeric == ("wind", "rain", "price")
    assert list(WHOLE.categories) == ["day", "promo", "shop"]
    assert WHOLE
    assert not Covariates()


def test_json_reads_back() -> None:
    for each in (WHOLE, Covariates()):
        again = Covariates.from_json(json.loads(json.dumps(each.to_json())))
        assert again == each
        assert list(again.columns) == list(each.columns)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"past": None}, "a role of covariates has numeric and categories"),
        ({"more": {}}, "covariates have the roles past, future, static"),
        ({"past": {"numeric": ["price"], "categories": {}}}, "'price' has two roles"),
        ({"past": {"numeric": ["u", "u"], "categories": {}}}, "lists of text, none twice"),
        ({"past": {"numeric": [], "categories": {"u": ["x", "x"]}}}, "none twice"),
        ({"past": {"numeric": [], "categories": {"u": [1]}}}, "lists of text"),
        ({"past": {"numeric": "uv", "categories": {}}}, "lists of text"),
        ({"past": {"numeric": [], "categories": ["u"]}}, "lists of text"),
        ({"past": {"numeric": []}}, "numeric and categories"),
    ],
)
def test_from_json_is_strict(change: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        Covariates.from_json({**WHOLE.to_json(), **change})
    with pytest.raises(DataError, match="have the roles"):
        Covariates.from_json([])
