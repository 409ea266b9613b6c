import sys

from w8a8.cli.output import print_table, progress


def test_a_table_shows_every_cell(capsys):
    print_table("Title", ("name", "value"), [("a", "1"), ("b[x]", "-2")])
    out = capsys.readouterr().out
    assert all(word in out for word in ("Title", "name", "value", "b[x]", "-2"))


def test_progress_is_silent_where_nobody_watches(capsys):
    with progress("work") as step:
        step(1, 2, "x")
    assert capsys.readouterr().err == ""


def test_progress_is_a_line_for_each_step_where_that_is_asked_for(capsys):
    with progress("work", lines=True) as step:
        step(1, 2, "x")
    assert capsys.readouterr().err == "work: x (1/2)\n"


def test_progress_draws_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    with progress("work") as step:
        step(1, 2, "layer")
    assert "work" in capsys.readouterr().err
