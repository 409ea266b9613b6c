"""Processes that share a job end together, and a machine prints one message."""

import pytest
import torch.distributed as dist

from w8a8.errors import CheckpointError, ElsewhereError, SchemeError
from w8a8.streaming.team import Team, team


@pytest.fixture
def others(monkeypatch):
    """Say what the other processes of a job gather; the own message takes its place."""

    def gather(messages):
        def all_gather_object(into, own):
            into[:] = [own if message == "own" else message for message in messages]

        monkeypatch.setattr(dist, "all_gather_object", all_gather_object)

    return gather


def fail():
    error = SchemeError("it is wrong")
    error.add_note("while quantising lm_head")
    raise error


def test_alone_a_step_is_only_run(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with team() as us:
        assert us == Team(0, 1, 1)
        assert us.together(lambda: 3) == us.first_then_others(lambda: 3) == 3
        with pytest.raises(SchemeError, match="it is wrong"):
            us.together(fail)


def test_where_all_end_well_each_has_its_own_result(others):
    others(["own", None])
    assert Team(0, 2, 2).together(lambda: "a") == "a"


def test_the_first_that_fails_tells_why(others):
    others([None, "own", "it failed here too"])
    with pytest.raises(SchemeError, match="it is wrong"):
        Team(1, 3, 3).together(fail)


@pytest.mark.parametrize("step", [fail, lambda: None], ids=["fails too", "ends well"])
def test_the_others_of_its_machine_end_silently(others, step):
    others(["it is wrong", "own"])
    with pytest.raises(ElsewhereError, match="process 0 failed: it is wrong"):
        Team(1, 2, 2).together(step)


def test_another_machine_repeats_the_message_once(others):
    others(["it is wrong", None, "own", None])
    with pytest.raises(CheckpointError, match="process 0 failed: it is wrong"):
        Team(2, 4, 2).together(lambda: None)
    others(["it is wrong", None, None, "own"])
    with pytest.raises(ElsewhereError):
        Team(3, 4, 2).together(lambda: None)


def test_the_notes_of_an_error_are_told_to_the_others(others, monkeypatch):
    told = []
    monkeypatch.setattr(dist, "all_gather_object", lambda into, own: (told.append(own), into.__setitem__(0, own)))
    with pytest.raises(SchemeError):
        Team(0, 2, 2).together(fail)
    assert told == ["it is wrong\n  while quantising lm_head"]


@pytest.mark.parametrize(("rank", "steps"), [(0, ["mine", None]), (1, [None, "mine"])])
def test_the_first_process_goes_before_the_others(monkeypatch, rank, steps):
    seen = []
    monkeypatch.setattr(dist, "all_gather_object", lambda into, own: seen.append("barrier"))
    assert Team(rank, 2, 2).first_then_others(lambda: seen.append("mine")) is None
    assert seen == [event for step in steps for event in (([step] if step else []) + ["barrier"])]
