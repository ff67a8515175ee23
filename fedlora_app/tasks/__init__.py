"""What runs fine-tune for; one file a task."""

from fedlora_app.tasks.base import (
    LOSS,
    TASKS,
    About,
    Indices,
    Inputs,
    Origin,
    Rows,
    Sample,
    Score,
    Sums,
    Task,
    make_task,
    primary,
    register_task,
)
from fedlora_app.tasks.causal_lm import CausalLM
from fedlora_app.tasks.image_classification import ImageClassification
from fedlora_app.tasks.preference import Preference
from fedlora_app.tasks.text_classification import TextClassification

__all__ = [
    "LOSS",
    "TASKS",
    "About",
    "CausalLM",
    "ImageClassification",
    "Indices",
    "Inputs",
    "Origin",
    "Preference",
    "Rows",
    "Sample",
    "Score",
    "Sums",
    "Task",
    "TextClassification",
    "make_task",
    "primary",
    "register_task",
]
