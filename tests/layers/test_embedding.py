"""QuantEmbedding: what is looked up is the table, quantised and dequantised, bit for bit."""

import copy
import pickle

import pytest
import torch
from torch import nn

from tests.conftest import needs
from w8a8 import PerChannel, PerColumn, PerGroup, PerTensor, QuantEmbedding, QuantLinear, QuantSpec, Scheme
from w8a8.core.affine import QTensor, dequantize, quantize
from w8a8.errors import NonFiniteError, SchemeError, WeightError
from w8a8.layers.embedding import TABLE, share_codes

SPECS = {
    "rows": TABLE.weights,
    "zero points": QuantSpec(granularity=PerChannel(), symmetric=False),
    "groups": QuantSpec(4, PerGroup(4)),
    "one scale": QuantSpec(granularity=PerTensor()),
}


def table(n=17, k=20, dtype=torch.float32, **more):
    return nn.Embedding(n, k, dtype=dtype, **more)


def pair():
    """A table and a head with the same codes."""
    float_table = table()
    head = nn.Linear(20, 17, bias=False)
    head.weight = nn.Parameter(float_table.weight.detach().clone())
    return nn.ModuleDict({"table": QuantEmbedding.from_float(float_table), "head": QuantLinear.from_float(head)})


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("ids", [torch.tensor(3), torch.tensor([[0, 16], [5, 5]], dtype=torch.int32), torch.arange(0)])
def test_rows_are_those_of_the_dequantised_table(name, dtype, ids):
    float_table = table(dtype=dtype)
    found = QuantEmbedding.from_float(float_table, Scheme(SPECS[name]))(ids)
    wanted = dequantize(quantize(float_table.weight.detach(), SPECS[name])).to(dtype)
    assert found.dtype is dtype
    assert torch.equal(found, wanted[ids.long()])


@pytest.mark.parametrize("n", [1, 31, 32, 33])
def test_rows_of_zeros_and_tables_of_one_row_are_looked_up(n):
    float_table = table(n)
    with torch.no_grad():
        float_table.weight[-1] = 0
    layer = QuantEmbedding.from_float(float_table)
    assert not layer(torch.tensor([n - 1])).any()
    assert torch.equal(layer(torch.arange(n)), layer.dequantized_weight())


def test_a_table_that_is_not_finite_is_an_error_with_its_place():
    float_table = table()
    with torch.no_grad():
        float_table.weight[3, 5] = torch.nan
    with pytest.raises(NonFiniteError, match=r"\(3, 5\)|\[3, 5\]"):
        QuantEmbedding.from_float(float_table)


@pytest.mark.parametrize(
    "scheme", [Scheme.of("w8a8"), Scheme(QuantSpec(12, PerChannel())), Scheme(QuantSpec(8, PerColumn()))]
)
def test_a_scheme_that_is_none_of_a_table_is_refused(scheme):
    with pytest.raises(SchemeError):
        QuantEmbedding(4, 8, scheme)


def test_what_is_no_table_or_has_no_values_is_refused():
    with pytest.raises(SchemeError, match="found Linear"):
        QuantEmbedding.from_float(nn.Linear(4, 4))
    with pytest.raises(SchemeError, match="meta"):
        QuantEmbedding.from_float(nn.Embedding(4, 4, device="meta"))
    with pytest.raises(SchemeError, match="groups of 3"):
        QuantEmbedding(4, 8, Scheme(QuantSpec(8, PerGroup(3))))


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("wrong", [17, 31, -1])
def test_an_id_that_is_no_row_is_an_error(shared, wrong):
    both = pair()
    if shared:
        share_codes(both)
    with pytest.raises(IndexError):
        both["table"](torch.tensor([2, wrong]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_move_to_another_dtype_changes_what_is_returned_and_no_code(dtype):
    layer = QuantEmbedding.from_float(table())
    before = layer.dequantized_weight()
    assert torch.equal(layer.to(dtype)(torch.arange(17)), before.to(dtype))
    assert torch.equal(layer.dequantized_weight(), before)
    assert layer.weight.dtype is dtype


def test_copies_pickles_and_state_dicts_have_the_same_rows():
    layer, ids = QuantEmbedding.from_float(table(padding_idx=2)), torch.arange(17)
    other = QuantEmbedding(17, 20)
    other.load_state_dict(layer.state_dict())
    for each in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), other):  # noqa: S301 - its own
        assert torch.equal(each(ids), layer(ids))
    assert set(layer.state_dict()) == {"weight", "weight_scale"}
    assert (layer.padding_idx, layer.num_embeddings, layer.embedding_dim) == (2, 17, 20)


def test_its_number_of_rows_may_be_said_again_and_is_no_other():
    layer = QuantEmbedding.from_float(table())
    layer.num_embeddings = 17
    with pytest.raises(SchemeError, match=r"num_embeddings=18 .* of 17 rows"):
        layer.num_embeddings = 18
    assert layer.num_embeddings == len(layer.weight) == 17


@pytest.mark.parametrize("place", [3, slice(2), (0, 1)])
def test_a_row_of_its_weight_is_refused_in_words(place):
    with pytest.raises(WeightError, match="of it was asked for, and the weight of a quantised layer is no float"):
        QuantEmbedding.from_float(table()).weight[place]


def test_a_float_table_is_not_loaded_into_codes():
    layer = QuantEmbedding.from_float(table())
    with pytest.raises(RuntimeError, match=r"this QuantEmbedding holds torch\.int8"):
        layer.load_state_dict({"weight": torch.ones(17, 20), "weight_scale": torch.ones(17, 1)})


class TestSharing:
    @pytest.mark.parametrize("kernel", [pytest.param("native", marks=needs("native")), "reference"])
    def test_codes_of_a_head_are_held_once(self, kernel):
        both, ids = pair(), torch.tensor([[0, 16], [9, 9]])
        both["head"].kernel = kernel
        before = both["table"](ids)
        share_codes(both)
        name = "packed_weight" if kernel == "native" else "weight"
        assert both["table"]._buffers[name] is both["head"]._buffers[name] is not None
        assert torch.equal(both["table"](ids), before)

    def test_copies_share_and_files_have_both(self):
        both = pair()
        share_codes(both)
        again = copy.deepcopy(both)
        name = "packed_weight" if again["head"].packed_weight is not None else "weight"
        assert again["table"]._buffers[name] is again["head"]._buffers[name] is not both["head"]._buffers[name]
        state = both.state_dict()
        assert torch.equal(state["table.weight"], state["head.weight"])
        assert state["table.weight"].data_ptr() != state["head.weight"].data_ptr()

    def test_what_is_loaded_into_a_head_does_not_change_its_table_twice(self):
        both, other = pair(), pair()
        share_codes(both)
        ids = torch.arange(17)
        other["table"] = QuantEmbedding.from_float(table())
        both.load_state_dict(other.state_dict())
        assert torch.equal(both["table"](ids), other["table"](ids))
        assert torch.equal(both["head"].codes, other["head"].codes)

    def test_other_codes_are_not_shared(self):
        both = pair()
        both["table"].weight_scale[0] *= 2
        share_codes(both)
        assert both["table"].packed_weight is None
        assert both["table"]._buffers["weight"] is not both["head"]._buffers.get("weight")

    def test_another_kernel_for_the_head_leaves_the_table_as_it_is(self):
        both, ids = pair(), torch.arange(17)
        share_codes(both)
        before = both["table"](ids)
        both["head"].kernel = "reference"
        assert torch.equal(both["table"](ids), before)


def test_it_computes_nothing_but_rows():
    q = QuantEmbedding.from_float(table())
    assert q.weight_sum.numel() == 0
    assert torch.equal(q.dequantized_weight(), dequantize(QTensor(q.codes, q.weight_scale, None)))
