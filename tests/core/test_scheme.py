import dataclasses

import pytest

from tests.conftest import TOKEN
from w8a8.core.scheme import (
    PRESETS,
    Operand,
    PerChannel,
    PerColumn,
    PerGroup,
    PerTensor,
    PerToken,
    QuantSpec,
    Scheme,
)
from w8a8.errors import SchemeError


@pytest.mark.parametrize("bits", [1, 0, -8, 17, 8.0, "8", True])
def test_bits_out_of_range_are_refused(bits):
    with pytest.raises(SchemeError, match=r"bits=.* is out of range"):
        QuantSpec(bits)


@pytest.mark.parametrize("size", [0, -1, 1.5, True])
def test_group_size_must_be_a_positive_integer(size):
    with pytest.raises(SchemeError, match="positive integer size"):
        PerGroup(size)


def test_a_class_is_not_a_granularity():
    with pytest.raises(SchemeError, match=r"use an instance .* PerChannel\(\)"):
        QuantSpec(granularity=PerChannel)


@pytest.mark.parametrize(
    ("operand", "granularity", "hint"),
    [
        (Operand.WEIGHT, PerToken(), "use PerChannel"),
        (Operand.ACTIVATION, PerColumn(), "use PerChannel"),
        (Operand.ACTIVATION, PerGroup(4), "use PerToken"),
    ],
)
def test_a_granularity_that_does_not_fit_the_operand_says_what_does(operand, granularity, hint):
    with pytest.raises(SchemeError, match=hint):
        QuantSpec(granularity=granularity).check(operand)
    with pytest.raises(SchemeError, match=hint):
        Scheme(QuantSpec(granularity=granularity)) if operand is Operand.WEIGHT else Scheme(
            QuantSpec(), QuantSpec(granularity=granularity)
        )


@pytest.mark.parametrize(
    ("bits", "symmetric", "qmin", "qmax"),
    [(8, True, -127, 127), (8, False, -128, 127), (2, True, -1, 1), (4, False, -8, 7)],
)
def test_code_range_is_that_of_the_contract(bits, symmetric, qmin, qmax):
    spec = QuantSpec(bits, symmetric=symmetric)
    assert (spec.qmin, spec.qmax) == (qmin, qmax)


@pytest.mark.parametrize(
    ("scheme", "why"),
    [
        (Scheme(QuantSpec(granularity=PerColumn()), TOKEN), "per-column weights"),
        (Scheme(QuantSpec(), QuantSpec(granularity=PerChannel())), "per-channel activations"),
        (Scheme(QuantSpec(9), TOKEN), "9 bits do not fit int8"),
        (Scheme(QuantSpec(), QuantSpec(16, PerToken())), "16 bits do not fit int8"),
        (Scheme(QuantSpec()), "activations stay float"),
    ],
)
def test_a_scheme_knows_why_integers_cannot_run_it(scheme, why):
    assert not scheme.integer_executable
    assert why in scheme.not_executable_because


def test_every_other_combination_is_executable():
    for weights in (PerTensor(), PerChannel(), PerGroup(32)):
        for activations in (PerTensor(), PerToken()):
            for symmetric in (True, False):
                for bits in range(2, 9):
                    for weights_symmetric in (True, False):
                        spec = QuantSpec(bits, weights, weights_symmetric)
                        assert Scheme(spec, QuantSpec(bits, activations, symmetric)).integer_executable


def test_presets_are_what_their_names_say():
    channel, tensor = QuantSpec(8, PerChannel()), QuantSpec(8, PerTensor())
    assert {name: preset.scheme for name, preset in PRESETS.items()} == {
        "w8a8": Scheme(channel, QuantSpec(8, PerToken())),
        "w8a8-asym": Scheme(channel, QuantSpec(8, PerToken(), symmetric=False)),
        "w8a8-tensor": Scheme(channel, tensor),
        "w8a8-o1": Scheme(tensor, QuantSpec(8, PerToken())),
        "w8a8-o2": Scheme(tensor, tensor),
        "w8a8-static": Scheme(channel, QuantSpec(8, PerTensor(), dynamic=False)),
        "w8a8-o3": Scheme(tensor, QuantSpec(8, PerTensor(), dynamic=False)),
        "w8a16": Scheme(channel, None),
    }
    assert [name for name, p in PRESETS.items() if not p.scheme.integer_executable] == ["w8a16"]


def test_a_preset_is_found_by_name_and_knows_it():
    scheme = Scheme.of("w8a8-asym")
    assert Scheme.of(scheme) is scheme
    assert scheme.name == "w8a8-asym"
    assert Scheme(QuantSpec(4), None).name == "weights int4 tensor sym, activations float"


def test_an_unknown_preset_lists_the_known_and_the_closest():
    with pytest.raises(SchemeError, match=r"unknown scheme 'w8a8asym' \(closest: w8a8-asym.*presets: w8a8, "):
        Scheme.of("w8a8asym")


def test_static_activations_have_one_scale():
    with pytest.raises(SchemeError, match="fixed beforehand is one per tensor"):
        Scheme(QuantSpec(), QuantSpec(granularity=PerToken(), dynamic=False))
    assert "static" in str(Scheme(QuantSpec(), QuantSpec(dynamic=False)))


def test_requests_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        QuantSpec().bits = 4
