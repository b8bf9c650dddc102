"""The tasks, one dataset a file; a new one is a module with a TASK and one more name below."""

import difflib

from bioinstruct.eval.task import Task
from bioinstruct.eval.tasks import ncbi_disease, pubmedqa

TASKS = {task.name: task for task in (ncbi_disease.TASK, pubmedqa.TASK)}


def find_task(name: str) -> Task:
    """Return the task of a name.

    Raises:
        ValueError: there is none.
    """
    if name not in TASKS:
        near = difflib.get_close_matches(name, TASKS, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"no task is called {name!r}, only {', '.join(TASKS)}{hint}")
    return TASKS[name]
