import pytest

from w8a8.errors import SchemeError
from w8a8.smoothing.alpha import GRID
from w8a8.smoothing.way import AUTO, NONE, SEARCHED, Smoothing


@pytest.mark.parametrize("way", [NONE, SEARCHED, AUTO, Smoothing.of(0.5)], ids=lambda way: str(way.told))
def test_a_way_is_read_from_what_tells_of_it(way):
    assert Smoothing.of(way) is way
    assert Smoothing.of(way.told) == Smoothing.of(str(way.told)) == way


def test_only_the_search_leaves_a_group_that_is_better_off_alone():
    assert (SEARCHED.alphas, SEARCHED.forced) == (GRID, False)
    assert (Smoothing.of(1).alphas, Smoothing.of(1).forced) == ((1.0,), True)
    assert NONE.alphas == ()


@pytest.mark.parametrize("bad", [1.5, "1.5", "nan", -0.1, True, [0.5]], ids=str)
def test_what_is_no_alpha_is_refused(bad):
    with pytest.raises(SchemeError, match=r"is not a number in 0\.\.1"):
        Smoothing.of(bad)


def test_other_words_are_refused_with_those_that_are_known():
    with pytest.raises(SchemeError, match=r"smooth='much' is unknown; use 'auto', 'searched', an alpha in 0\.\.1"):
        Smoothing.of("much")
