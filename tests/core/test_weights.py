"""Weights that are not a model's, said in a line."""

import pytest
import torch
from torch import nn

from manyheads.core.errors import DataError
from manyheads.core.weights import check_fit, misfits


def test_what_fits_has_no_faults():
    model = nn.Linear(3, 2)
    assert misfits(model.state_dict(), model.state_dict()) == ""
    check_fit(model, model.state_dict(), "layer")


def test_each_kind_of_fault_is_named():
    wanted = {"a": torch.zeros(3), "b": torch.zeros(2), "c": torch.zeros(1)}
    found = {"b": torch.zeros(4), "c": torch.zeros(1), "d": torch.zeros(1)}
    assert misfits(wanted, found) == (
        "tensors 1 missing (a); 1 left over (d); 1 of another shape (b is [4], not [2])"
    )


def test_many_faults_are_counted_and_few_listed():
    found = {f"layer{i}": torch.zeros(1) for i in range(5)}
    assert misfits({}, found) == "tensors 5 left over (layer0, layer1, layer2, ...)"
    with pytest.raises(DataError, match=r"do not fit this Vim: tensors 5 missing"):
        check_fit(nn.ParameterDict(found), {}, "Vim")  # type: ignore[arg-type]
