"""What a run is about, in one object: its rows, its model, and how good that is.

Everything else in the app, from the partition to the report page, asks the task and knows
of no label, token, pixel or metric. Models follow Hugging Face's convention:
``model(**batch)`` returns ``.loss`` and ``.logits``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from fedlora_app.config.plugins import load
from fedlora_app.tasks.use import Use
from strategies.naming import Registry
from strategies.scores import LOSS as LOSS  # a task imports them from here
from strategies.scores import Score as Score

if TYPE_CHECKING:  # torch takes seconds, and the door looks at rows without it
    from torch import Tensor, nn

    from fedlora_app.config.keys import RunConfig
    from fedlora_app.data.tables import Table

Indices = NDArray[np.int64]
About = Mapping[str, Any]
Sums = Mapping[str, NDArray[np.float64]]


@dataclass(frozen=True)
class Origin:
    """How rows were taken from their files."""

    files: tuple[str, ...] = ()
    columns: Mapping[str, str] = field(default_factory=dict)  # role → column: {"text": "body"}
    left: tuple[str, ...] = ()  # columns
    blank: int = 0  # rows left out, since they hold nothing
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Rows:
    """Rows before the model's own view of them: n texts, pairs or images, and what is wanted.

    Parameters
    ----------
    items : sequence of length n
        What a task's ``encode`` takes: texts, pairs of texts, images or their paths.
    targets : ndarray or sequence of length n
        What is to be predicted; int64 positions in ``about["labels"]`` for classifiers.
    about : mapping
        What every node of the federation must agree on, JSON-able: label names and their order.
    groups : ndarray of str, shape (n,), optional
        Values of ``data.partition-column``: whose each row is.
    origin : Origin, optional
    """

    items: Sequence[Any]
    targets: Any
    about: About = field(default_factory=dict)
    groups: NDArray[np.str_] | None = None
    origin: Origin = field(default_factory=Origin, compare=False)

    def __len__(self) -> int:
        return len(self.items)

    def take(self, indices: Sequence[int] | Indices) -> Rows:
        """Return the rows at ``indices``, in that order."""
        chosen = np.asarray(indices, dtype=np.int64)
        targets = self.targets
        taken = targets[chosen] if isinstance(targets, np.ndarray) else [targets[i] for i in chosen]
        groups = None if self.groups is None else self.groups[chosen]
        items = [self.items[i] for i in chosen]
        return Rows(items, taken, self.about, groups, self.origin)


@dataclass(frozen=True)
class Sample:
    """What a model made of one row, in words: for people, in the record and on the page.

    Parameters
    ----------
    asked, wanted, given : str
        What the model was given, what the data have as its answer, and what came.
    score : float
        How good that is.
    """

    asked: str
    wanted: str
    given: str
    score: float


class Inputs(Protocol):
    """Rows as the model takes them, in memory."""

    @property
    def sizes(self) -> NDArray[np.int64]:
        """Cost of each row, shape (n,): tokens, for batches of like length; ones where all are."""
        ...

    def __len__(self) -> int: ...

    def take(self, indices: Sequence[int] | Indices) -> Inputs:
        """Return the rows at ``indices``, in that order."""
        ...

    def batch(self, indices: Sequence[int] | Indices) -> dict[str, Tensor]:
        """Return some rows as ``model(**batch)`` takes them, with the task's ``target``."""
        ...


class Task(Use, ABC):
    """What a run fine-tunes for. One object in each process, made from the run config.

    A task of one's own is a subclass with a ``name``, registered with ``register_task`` in a
    module that ``plugins`` names; docs/tasks.md builds one.
    """

    name: ClassVar[str] = ""
    scores: tuple[Score, ...] = ()
    """Of the class, or by its config of an object. Best first: the primary score is what
    ``checkpoint-best`` and ``stop-score`` look at."""
    units: ClassVar[tuple[str, ...]] = ("rows", "clients")
    """What clients may be weighed by (``weight-by``), the default first; see ``size``."""
    reads: ClassVar[frozenset[str]] = frozenset()
    """Keys of the run config that mean something to few tasks, of those that some task names here;
    others are refused, for they would be without effect."""
    keeps_base: ClassVar[bool] = False
    """Whether it needs the frozen weights as they were, so that no rule may merge into them."""
    quantizable: ClassVar[bool] = False
    """Whether ``model`` follows ``model.quantization``: a frozen base of 4 or 8 bits."""
    one_pass: ClassVar[bool] = True
    """Whether a step is one forward pass over its batch, which several clients can share."""
    target: ClassVar[str] = "labels"
    """The tensor of a batch that says what is wanted; without it a model gives logits all the same,
    and its first axis counts the rows."""
    peft_type: ClassVar[str | None] = None
    """PEFT's name of the task, for ``AutoPeftModel`` to find a model of transformers by."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config

    # ----- rows ------------------------------------------------------------------------

    @abstractmethod
    def rows(self, table: Table, about: About | None, place: str) -> Rows:
        """Return what a table of data holds.

        Parameters
        ----------
        table : Table
            Columns as they were read, and where each row stands.
        about : mapping, optional
            As the other nodes know it (default: found in the table).
        place : str
            What errors call the data.
        """

    def passed_over(self, table: Table, rows: Rows) -> str:
        """Return why a table cannot test a model that trained on ``rows``; empty: it can."""
        return "" if self.knows(table) else "no such columns"

    def knows(self, table: Table) -> bool:
        """Tell whether the columns of a table can be told."""
        return True

    def splits(self, name: str) -> Mapping[str, Table]:
        """Return the tables of a data set by split; ``train``, and ``test`` or the like."""
        from fedlora_app.data.tables import read_splits

        return read_splits(name)

    def own_table(self, path: str) -> Table:
        """Return the table of a node's own file or folder."""
        from fedlora_app.data.rows import own_table

        return own_table(path)

    def train_rows(self, about: About | None = None) -> Rows:
        """Return the training rows of ``data.name``, without those held out for tests."""
        from fedlora_app.data.rows import read_train

        return read_train(self, self.config.data.name, about)

    def test_rows(self, about: About | None = None) -> Rows:
        """Return the server's test rows: a split of their own, or held out from training."""
        from fedlora_app.data.rows import read_test

        return read_test(self, self.config.data.name, about)

    def own_rows(self, path: str, about: About | None) -> Rows:
        """Return the rows of a node's own file or folder."""
        return self.rows(self.own_table(path), about, path)

    def strata(self, rows: Rows) -> NDArray[np.int64] | None:
        """Return a class of each row, shape (n,), for partitions and AutoRank's label measures.

        None where rows have no classes: they are then shared out iid or by a column, and
        AutoRank looks at losses alone.
        """
        return None

    def mix(self, inputs: Inputs, strata: NDArray[np.int64]) -> NDArray[Any]:
        """Return of what AutoRank's two label measures are the mix, shape (m,), on one node.

        Parameters
        ----------
        inputs : Inputs
            The node's training rows.
        strata : ndarray of int64
            Their classes; empty where they have none.
        """
        return strata

    def strata_names(self, about: About) -> Sequence[str]:
        """Return the names of the classes of ``strata``."""
        return ()

    def look_at(self, rows: Rows) -> None:
        """Raise DataError if something in the rows cannot be used; done once, at the door."""
        return None

    def show(self, rows: Rows) -> list[str]:
        """Return lines about rows for the block before a run: the first, the longest."""
        return []

    # ----- the model -------------------------------------------------------------------

    @abstractmethod
    def encode(self, rows: Rows) -> Inputs:
        """Return rows as the model takes them."""

    def fingerprint(self, rows: Rows) -> bytes | None:
        """Return all that ``encode`` depends on beside the config: rows, and files it reads.

        With it, encoded rows of a simulation are kept on this machine, where ``encode`` returns a
        dataclass of arrays, tensors, numbers and lists of arrays, and ``restored`` makes it anew.
        None: they are not kept.
        """
        return None

    def restored(self, fields: Mapping[str, Any]) -> Inputs:
        """Return what ``encode`` returned, from its fields."""
        raise NotImplementedError(f"{self.name} has a fingerprint, and does not restore rows")

    @abstractmethod
    def model(
        self, about: About, *, seed: int, precision: str = "float32", shapes_only: bool = False
    ) -> nn.Module:
        """Return the pretrained model, in evaluation mode, without LoRA.

        Its attribute ``loaded`` (``pretrained.Loaded``) says what came from files and what is
        new; new weights come from a generator of ``seed``. ``shapes_only``: on the device
        "meta", no weights are read.
        """

    def problems(self, model: nn.Module, rows: Rows) -> list[str]:
        """Return, one sentence each, how model and rows do not go together."""
        return []

    def size(self, inputs: Inputs) -> int:
        """Return how much some rows count beside those of other clients, in ``weight-by``'s unit.

        Whatever a client says of its size is this, in every message: samplers and estimators
        compare what it said before a round with what it says after.
        """
        return min(1, len(inputs)) if self.config.weight_by == "clients" else len(inputs)

    def fill(self) -> dict[str, int]:
        """Return with what rows are filled up to the same length, by tensor; empty: they have it.

        The first tensor is the one whose second axis is the length.
        """
        return {}

    def for_training(self, inputs: Inputs) -> Inputs:
        """Return the same rows with batches as training takes them, for ``train``."""
        return inputs

    # ----- how good it is --------------------------------------------------------------

    @abstractmethod
    def losses(self, logits: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the loss of each row of a batch, shape (rows,)."""

    def training_loss(self, logits: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the loss of a batch, as ``model(**batch).loss`` is, where clients share one."""
        return self.losses(logits, batch).mean()

    def judge(self, logits: Tensor, batch: Mapping[str, Tensor]) -> dict[str, NDArray[np.float64]]:
        """Return what adds up over batches to the scores; ``[sum, weight]`` each by default."""
        return {}

    def summary(self, sums: Sums) -> dict[str, float]:
        """Return the scores by name from what ``judge`` gave for all rows."""
        return {name: float(total / weight) for name, (total, weight) in sums.items()}

    def try_out(self, model: nn.Module, rows: Rows) -> tuple[Mapping[str, float], Sequence[Sample]]:
        """Return what is only seen when the model is put to use on the server's test rows.

        After every evaluation there: more of the scores, and samples for people. Which rows, and
        how many, is for the task to say; the same each time.
        """
        return {}, ()

    def quality(self, scores: Mapping[str, float]) -> float:
        """Return how much a client of these scores counts for rules that weigh by quality (> 0)."""
        first = primary(self)
        value = scores[first.name]
        return max(value if first.higher_is_better else float(np.exp(-value)), 1e-6)


TASKS: Registry[type[Task]] = Registry()


def register_task(cls: type[Task]) -> type[Task]:
    """Make a task available by its ``name``, for the key ``task`` of the run config.

    A class defined anew, as when its module is loaded again, takes the place of the old one.

    Raises
    ------
    ValueError
        If it has no name, or another task has it.
    """
    return TASKS.register(cls)


def primary(task: Task) -> Score:
    """Return the score that decides between models: the task's first, or the loss."""
    return (*task.scores, LOSS)[0]


def make_task(config: RunConfig) -> Task:
    """Return the task of a run config, from its plug-ins if it is not one of ours.

    Raises
    ------
    ValueError
        If a plug-in cannot be imported, or there is no such task; the message says why, or lists
        those that exist.
    """
    problems = [] if config.task in TASKS else load(config.plugins)
    if problems and config.task not in TASKS:  # other plug-ins may be the server's alone
        raise ValueError("; ".join(problems))
    return TASKS.make(config.task, config)
