"""What people expect around a library is there, can be parsed, and says the same everywhere."""

import re
from pathlib import Path

import pytest
import yaml

import w8a8

ROOT = Path(__file__).parents[1]
HOME = "https://github.com/w8a8/w8a8"
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def parsed(path):
    """Strings only: `on` is a key of workflows, and true in YAML 1.1."""
    return yaml.load(path.read_text(), Loader=yaml.BaseLoader)


@pytest.fixture
def project():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no parser of TOML")
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def steps(workflow):
    return [step for job in workflow["jobs"].values() for step in job["steps"]]


def test_home_is_the_same_everywhere(project):
    from w8a8.checkpoint import card

    citation = parsed(ROOT / "CITATION.cff")
    assert project["project"]["urls"]["Homepage"] == citation["repository-code"] == citation["url"] == card.HOME == HOME
    assert all(url.startswith(HOME) for url in project["project"]["urls"].values())
    assert f"{HOME}/security/advisories/new" in (ROOT / "SECURITY.md").read_text()


def test_the_citation_is_of_this_version_and_licence(project):
    citation = parsed(ROOT / "CITATION.cff")
    assert citation["cff-version"] == "1.2.0"
    assert citation["version"] == w8a8.__version__
    assert citation["license"] == project["project"]["license"]
    assert {"message", "title", "authors"} <= set(citation)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_may_do_only_what_it_says(path):
    workflow = parsed(path)
    assert set(workflow) >= {"name", "on", "permissions", "jobs"}
    assert workflow["permissions"] == {"contents": "read"}
    asked = {name: job["permissions"] for name, job in workflow["jobs"].items() if "permissions" in job}
    assert asked in ({}, {"publish": {"id-token": "write"}})
    for job in workflow["jobs"].values():
        assert {"runs-on", "timeout-minutes", "steps"} <= set(job)
    for step in steps(workflow):
        assert ("uses" in step) != ("run" in step)
        if step.get("uses", "").startswith("actions/checkout"):
            assert step["with"]["persist-credentials"] == "false"


def test_the_tests_of_hosted_ci_are_those_of_any():
    assert [step["run"] for step in steps(parsed(ROOT / ".github/workflows/tests.yml")) if "run" in step] == [".ci/run"]


def test_hosted_ci_runs_the_pythons_that_are_classified(project):
    (job,) = parsed(ROOT / ".github/workflows/tests.yml")["jobs"].values()
    classified = [line.rpartition(" ")[2] for line in project["project"]["classifiers"] if "Python :: 3." in line]
    assert [f"{version}" for version in job["strategy"]["matrix"]["python"]] == classified[1:]  # constraints.txt: 3.11


def test_a_release_is_published_without_a_token():
    jobs = parsed(ROOT / ".github/workflows/wheels.yml")["jobs"]
    assert set(jobs["publish"]["needs"]) == {"wheels", "source"}
    assert jobs["publish"]["if"] == "github.event_name == 'release'"
    assert "secrets." not in (ROOT / ".github/workflows/wheels.yml").read_text()


def test_the_hooks_are_of_the_environment_and_call_what_make_check_calls():
    (repository,) = parsed(ROOT / ".pre-commit-config.yaml")["repos"]
    assert repository["repo"] == "local"
    recipe = re.search(r"^check:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE).group(1)
    for hook in repository["hooks"]:
        assert hook["language"] == "system"
        words = [word for word in hook["entry"].split() if not word.startswith("-")]
        assert f"$(BIN)/{' '.join(words)}" in recipe


def test_what_security_md_names_is_there():
    for path in re.findall(r"`(tests/[^`]+)`", (ROOT / "SECURITY.md").read_text()):
        assert (ROOT / path).is_file()
