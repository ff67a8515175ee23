"""What runs fine-tune for; one file a task."""

from fedlora_app.tasks.base import (
    LOSS,
    TASKS,
    About,
    Indices,
    Inputs,
    Origin,
    Rows,
    Score,
    Sums,
    Task,
    make_task,
    register_task,
)

__all__ = [
    "LOSS",
    "TASKS",
    "About",
    "Indices",
    "Inputs",
    "Origin",
    "Rows",
    "Score",
    "Sums",
    "Task",
    "make_task",
    "register_task",
]
