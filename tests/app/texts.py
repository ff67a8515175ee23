"""Texts to classify, as tests look at them: through the task, for a data config alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedlora_app.config.keys import DataConfig, ModelConfig, RunConfig
from fedlora_app.data.partition import partition as partition_indices
from fedlora_app.tasks import Rows, TextClassification
from fedlora_app.tasks.text_classification import Tokens
from fedlora_app.tasks.text_classification import tokenize as tokenize_rows

__all__ = [
    "TASK",
    "Texts",
    "Tokens",
    "load_own",
    "load_test",
    "load_train",
    "partition_indices",
    "tokenize",
]


@dataclass(frozen=True)
class Texts:
    rows: Rows

    @classmethod
    def of(cls, texts: Sequence[str], labels: Sequence[int], names: Sequence[str]) -> "Texts":
        return cls(Rows(list(texts), np.array(labels), {"labels": list(names)}))

    @property
    def texts(self) -> Sequence[str]:
        return self.rows.items

    @property
    def labels(self) -> Any:
        return self.rows.targets

    @property
    def label_names(self) -> tuple[str, ...]:
        return tuple(self.rows.about["labels"])

    @property
    def origin(self) -> Any:
        return self.rows.origin

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, indices: Sequence[int]) -> "Texts":
        return Texts(self.rows.take(indices))


def task(config: DataConfig, model: ModelConfig | None = None) -> TextClassification:
    return TextClassification(RunConfig(data=config, model=model or ModelConfig()))


TASK = task(DataConfig())


def about(names: Sequence[str] | None) -> dict[str, list[str]] | None:
    return None if names is None else {"labels": list(names)}


def load_train(config: DataConfig, names: Sequence[str] | None = None) -> Texts:
    return Texts(task(config).train_rows(about(names)))


def load_test(config: DataConfig, names: Sequence[str] | None = None) -> Texts:
    return Texts(task(config).test_rows(about(names)))


def load_own(path: Any, config: DataConfig, names: Sequence[str] | None) -> Texts:
    return Texts(task(config).own_rows(str(path), about(names)))


def tokenize(texts: Texts, tokenizer: Any, max_length: int) -> Tokens:
    return tokenize_rows(texts.rows, tokenizer, max_length)
