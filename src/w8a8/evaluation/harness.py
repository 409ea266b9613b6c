"""Multiple choice and everything else: the installed lm-evaluation-harness, on our model object."""

import importlib
from collections.abc import Sequence
from pathlib import Path

from w8a8.checkpoint.opening import Named, OpenedModel, open_model
from w8a8.defaults import usual_defaults
from w8a8.errors import ModelError, closest
from w8a8.model.kinds import Asked

ASKED = Asked("tasks of the harness")


def run_tasks(
    model: Named | OpenedModel,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    num_fewshot: int | None = None,
    include_path: Path | None = None,
    batch_size: int = 1,
) -> dict[str, dict[str, object]]:
    """What the harness measures: for each task its metrics by the harness's names, standard errors beside them.

    Args:
        model: A causal language model, float or quantised, or the name of one.  Not modified.
        tasks: Names that the harness knows, of its own or of `include_path`.
        limit: Only the first so many documents of each task.
        num_fewshot: Examples before each question; the task's own number by default.
        include_path: A directory with task definitions (YAML).
        batch_size: Requests in a forward.

    Raises:
        ModelError: it is another kind of model, the harness is not installed or does not know a task, or there is no
            tokenizer.
    """
    there = open_model(model, ASKED)
    try:
        harness = importlib.import_module("lm_eval")
        wrapper, manager = (importlib.import_module(f"lm_eval.{part}") for part in ("models.huggingface", "tasks"))
    except ImportError as error:
        raise ModelError(
            f"tasks are measured by lm-evaluation-harness, which cannot be imported ({error}): pip install 'w8a8[eval]'"
        ) from error
    if there.tokenizer is None:
        raise ModelError("the model's directory has no tokenizer, so no task can be asked; save one beside it")
    known = manager.TaskManager(include_path=None if include_path is None else str(include_path))
    for task in tasks:
        if task not in known.all_tasks:
            raise ModelError(f"the harness knows no task {task!r} ({closest(task, known.all_tasks)})")
    with usual_defaults():
        found = harness.simple_evaluate(
            model=wrapper.HFLM(pretrained=there.model, tokenizer=there.tokenizer, batch_size=batch_size),
            tasks=list(tasks),
            num_fewshot=num_fewshot,
            limit=limit,
            task_manager=known,
        )
    return {task: dict(metrics) for task, metrics in found["results"].items()}
