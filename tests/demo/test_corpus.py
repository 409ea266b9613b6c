import hashlib
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import w8a8
from w8a8.demo.corpus import (
    HELD_OUT,
    MIN_CHARS,
    SEPARATOR,
    SHARED_WORDS,
    held_out_text,
    training_text,
)
from w8a8.errors import TextError, W8A8Error


@pytest.fixture(scope="module")
def training() -> list[str]:
    return training_text().split(SEPARATOR)


@pytest.fixture(scope="module")
def held_out() -> list[str]:
    return held_out_text().split(SEPARATOR)


@pytest.fixture
def small_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A standard library of the held-out modules, each with one docstring, and no other module."""
    for name in HELD_OUT:
        write(tmp_path / f"{name}.py", f"What the module {name} is for is said in this docstring of its own.")
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    return tmp_path


def write(path: Path, docstring: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{docstring!r}\n", encoding="utf-8")


def words(text: str) -> list[str]:
    return text.casefold().split()


@pytest.mark.slow
def test_texts_are_long_enough_to_train_and_score_a_small_model(training: list[str], held_out: list[str]) -> None:
    assert sum(map(len, training)) > 1_000_000
    assert 100_000 < sum(map(len, held_out)) < 200_000


def test_each_held_out_module_exists_and_gives_text(held_out: list[str]) -> None:
    assert set(HELD_OUT) <= sys.stdlib_module_names
    assert len(set(HELD_OUT)) == len(HELD_OUT)
    for phrase in (
        "Command-line parsing library",  # argparse
        "Configuration file parser.",
        "Get useful information from live Python objects.",  # inspect
        "Random variable generators.",
        "Utility functions for copying and archiving files",  # shutil
        "Basic statistics module.",
        "Subprocesses with accessible I/O streams",
        "Wrap a single paragraph of text, returning a list of wrapped lines.",
        "Thread module emulating a subset of Java's threading model.",
    ):
        assert any(text.startswith(phrase) for text in held_out), phrase


@pytest.mark.slow
def test_no_held_out_docstring_is_in_the_training_text(training: list[str], held_out: list[str]) -> None:
    assert not {" ".join(words(text)) for text in training} & {" ".join(words(text)) for text in held_out}


@pytest.mark.slow
def test_no_long_run_of_held_out_words_is_in_a_training_docstring(training: list[str], held_out: list[str]) -> None:
    def runs(texts: list[str]) -> set[str]:
        listed = [words(text) for text in texts]
        return {" ".join(w[i : i + SHARED_WORDS]) for w in listed for i in range(len(w) - SHARED_WORDS + 1)}

    assert len(runs(held_out)) > 5_000
    assert not runs(training) & runs(held_out)


@pytest.mark.slow
def test_docstrings_are_distinct_trimmed_and_not_tiny(training: list[str], held_out: list[str]) -> None:
    for texts in (training, held_out):
        assert len({" ".join(words(text)) for text in texts}) == len(texts)
        for text in texts:
            assert len(text) >= MIN_CHARS
            assert text == text.strip()
            assert not any(line.endswith((" ", "\t")) for line in text.split("\n"))


@pytest.mark.slow
def test_texts_are_the_same_in_another_process_that_strips_docstrings(training: list[str], held_out: list[str]) -> None:
    script = """if True:
        import hashlib, sys
        from w8a8.demo.corpus import held_out_text, training_text
        texts = held_out_text() + training_text()
        print(sys.flags.optimize, held_out_text.__doc__, hashlib.sha256(texts.encode()).hexdigest())
    """
    source = str(Path(w8a8.__file__).parent.parent)
    ran = subprocess.run(
        [sys.executable, "-OO", "-c", script],
        env=os.environ | {"PYTHONPATH": source, "PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
        check=True,
    )
    texts = SEPARATOR.join(held_out) + SEPARATOR.join(training)
    assert ran.stdout.split() == ["2", "None", hashlib.sha256(texts.encode()).hexdigest()]


def test_the_training_side_gives_way_to_a_held_out_docstring(small_library: Path) -> None:
    twin = f"what the module {HELD_OUT[0]} is for   is said\n\nin this docstring of its OWN."
    long = "the quick brown fox jumps over the lazy dog and then it sleeps until noon"
    write(small_library / "argparse.py", f"It is said here that {long} in the sun.")
    write(small_library / "aaa.py", twin.replace(HELD_OUT[0], HELD_OUT[1]))
    write(small_library / "bbb.py", f"It is said elsewhere that {long} in the shade.")
    write(small_library / "ccc.py", "It is said nowhere else what this module may be for.")
    assert training_text() == "It is said nowhere else what this module may be for."
    assert f"It is said here that {long} in the sun." in held_out_text()


def test_third_parties_tests_and_files_that_do_not_parse_are_not_read(small_library: Path) -> None:
    for folder in ("site-packages", "dist-packages", "test", "email/tests", "lib2to3"):
        write(
            small_library / folder / "package" / "module.py",
            f"A docstring found in {folder}, which is skipped.",
        )
    (small_library / "template.py").write_text('"""A docstring in a file that is no Python."""\nclass {name}:\n')
    (small_library / "odd.py").write_bytes(b"# coding: klingon\n'A docstring in a file that cannot be decoded.'\n")
    (small_library / "escape.py").write_text("def f():\n    '''A docstring with the invalid escape \\d is read.'''\n")
    write(small_library / "email" / "message.py", "A docstring in a file of a package, which is read.")
    assert training_text().split(SEPARATOR) == [
        "A docstring in a file of a package, which is read.",
        "A docstring with the invalid escape \\d is read.",
    ]


def test_docstrings_come_in_the_order_of_the_page_without_their_indentation(small_library: Path) -> None:
    (small_library / "page.py").write_text(
        '"""First, the module, which has a docstring of its own.\n\n\n\n    A paragraph.  \n"""\n'
        "class Second:\n"
        '    """Second, the class, which has a docstring of its own."""\n'
        "    async def third(self):\n"
        '        """Third, the method, which has a docstring of its own.\n\n'
        '            Indented.\n\n        Not indented.\n        """\n'
        "if True:\n"
        "    def fourth():\n"
        '        """Fourth, a function which is only defined sometimes."""\n'
        "def fifth():\n"
        '    """Too short."""\n'
    )
    assert training_text().split(SEPARATOR) == [
        "First, the module, which has a docstring of its own.\n\nA paragraph.",
        "Second, the class, which has a docstring of its own.",
        "Third, the method, which has a docstring of its own.\n\n    Indented.\n\nNot indented.",
        "Fourth, a function which is only defined sometimes.",
    ]


def test_a_held_out_module_may_be_a_package(small_library: Path) -> None:
    (small_library / "random.py").unlink()
    write(small_library / "random" / "__init__.py", "Random variable generators, now in a package.")
    write(small_library / "other.py", "Something else that may be trained on without harm.")
    assert "Random variable generators, now in a package." in held_out_text()
    assert training_text() == "Something else that may be trained on without harm."


@pytest.mark.parametrize("text", [training_text, held_out_text])
def test_missing_sources_are_named_with_their_place_and_a_way_out(
    text: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert callable(text)
    nowhere = tmp_path / "python311.zip"
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(nowhere)})
    with pytest.raises(TextError) as caught:
        text()
    message = str(caught.value)
    assert isinstance(caught.value, OSError)
    assert isinstance(caught.value, W8A8Error)
    assert "asked for the docstrings" in message
    assert all(name in message for name in HELD_OUT)
    assert str(nowhere) in message
    assert "Run under" in message


def test_one_missing_module_is_an_error_that_names_it_alone(small_library: Path) -> None:
    (small_library / "shutil.py").write_text("import os\n")
    with pytest.raises(TextError, match=r"1 of them \(shutil\)"):
        held_out_text()


def test_a_library_of_held_out_modules_only_has_no_training_text(small_library: Path) -> None:
    assert held_out_text()
    with pytest.raises(TextError, match="no docstring outside argparse"):
        training_text()
