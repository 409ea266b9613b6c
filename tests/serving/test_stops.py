import pytest

from w8a8.serving.stops import Stops


def handed_on(stops, pieces):
    """What comes out, and how often the stop was told."""
    out, told = [], []
    entrance = Stops(stops, out.append, lambda: told.append(True))
    for piece in pieces:
        entrance.put_nowait(piece)
    return out, len(told)


@pytest.mark.parametrize(
    ("stops", "pieces", "out", "told"),
    [
        ((), ["a", "b", None], ["a", "b", None], 0),
        (("END",), ["one E", "N", "D two", None], ["one ", None], 1),
        (("END",), ["one E", "N", "o", None], ["one ", "ENo", None], 0),
        (("END",), ["one EN", None], ["one ", "EN", None], 0),
        (("b", "ab"), ["xab"], ["x", None], 1),
        (("aab",), ["aa", "ab"], ["a", None], 1),
        (("é",), ["caf", "é!"], ["caf", None], 1),
        (("x",), ["x"], [None], 1),
    ],
)
def test_a_stop_is_found_across_pieces_and_is_no_part_of_the_answer(stops, pieces, out, told):
    assert handed_on(stops, pieces) == (out, told)


def test_what_is_no_text_goes_on_behind_what_was_held_back():
    error = ValueError("of the writer")
    assert handed_on(("END",), ["a E", error]) == (["a ", "E", error], 0)
