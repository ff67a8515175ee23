"""Several clients trained in one batch: one forward and backward pass for all of them.

The frozen base is shared. Every trained layer multiplies each client's rows by its own weights,
stacked and filled up with zeros to the largest rank; what a zero is multiplied by has no gradient.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from fedlora_app.config.keys import TrainConfig
from fedlora_app.rendezvous import Order, Rendezvous
from fedlora_app.tasks.base import Inputs, Task
from fedlora_app.training import amount, batches, default_device, rates
from strategies.client.peft_model import adapter_parameters
from strategies.dropout import QuickDropout, draw
from strategies.lora import Adapter
from strategies.losses import autocast_type, on_device
from strategies.surroundings import mode, seeded, torch_threads
from strategies.training import TrainOutcome, training_seed
from strategies.updates import Updates


@dataclass(frozen=True)
class Job:
    """What one client is to train.

    Parameters
    ----------
    adapter : Adapter
        What it starts from, of its own rank.
    inputs : Inputs
        At least one row.
    config : TrainConfig
        Precision and threads are those of all jobs that are trained together.
    seed : int
    message : Mapping[str, Any] (default: none)
        Both as in ``train``.
    """

    adapter: Adapter
    inputs: Inputs
    config: TrainConfig
    seed: int
    message: Mapping[str, Any] = field(default_factory=dict)


def train_with_others(
    meeting: Rendezvous,
    task: Task,
    model: nn.Module,
    job: Job,
    place: Any,
    elsewhere: Callable[[Any, Mapping[str, Any]], tuple[Inputs, TrainConfig]],
) -> TrainOutcome | None:
    """Train a job in one batch with those of other processes, in place; None: not possible.

    Parameters
    ----------
    meeting : Rendezvous
    task : Task
    model : nn.Module
        Which the job's adapter is loaded in.
    job : Job
    place : what JSON can say
        Says to another process which rows are trained on.
    elsewhere : callable
        Returns the rows of such a place, and how they are trained on, from a job's message.
    """
    named = dict(adapter_parameters(model, "default", all_parameters=False))
    scale = next((pair.scale for pair in job.adapter.pairs.values()), 1.0)

    def work(orders: Sequence[Order]) -> list[Order]:
        jobs = []
        for order in orders:
            state = {key: torch.from_numpy(value) for key, value in order.arrays.items()}
            message = order.about["message"]
            inputs, config = elsewhere(order.about["place"], message)
            jobs.append(
                Job(Adapter.from_state_dict(state, scale), inputs, config, job.seed, message)
            )
        found = train_together(task, model, jobs)
        model.to("cpu")  # another process may lead next, with its own copy of the base
        return [Order(_numbers(adapter), asdict(done)) for done, adapter in found]

    own = Order(_numbers(job.adapter), {"message": dict(job.message), "place": place})
    found = meeting.done(own, work)
    if found is None:
        return None
    with torch.no_grad():
        for key, value in found.arrays.items():
            named[key].copy_(torch.from_numpy(value))
    return TrainOutcome(**found.about)


def _numbers(adapter: Adapter) -> dict[str, NDArray[Any]]:
    return {key: value.detach().cpu().numpy() for key, value in adapter.to_state_dict().items()}


def train_together(
    task: Task, model: nn.Module, jobs: Sequence[Job]
) -> list[tuple[TrainOutcome, Adapter]]:
    """Train the adapters of several clients at once; each as if ``train`` had trained it alone.

    Equal to one after the other within rounding, each with its own rank, rows, rates, clipping
    and optimiser. With dropout as well, on a CPU and for a model whose dropout ``train`` draws
    itself (of at least ``training.LARGE`` parameters); a GPU draws from one stream for all.

    Parameters
    ----------
    task : Task
        Says what the loss of a row is, and how rows of different length are filled up.
    model : nn.Module
        From ``add_lora``, of any rank. Its weights stay as they are.
    jobs : sequence of Job
        At least one. Those with fewer steps leave the batch early.

    Returns
    -------
    list of (TrainOutcome, Adapter)
        In the order of the jobs; the seconds are each one's share.

    Raises
    ------
    ValueError
        If the jobs cannot share a batch, or something is trained that is no linear layer's.
    """
    _check(model, jobs)
    start = time.perf_counter()
    device, config = default_device(), jobs[0].config
    dtype, fill = autocast_type(config.precision), task.fill()
    model.to(device)
    named = dict(adapter_parameters(model, "default", all_parameters=False))
    clients = [_Client(job, named, device) for job in jobs]
    with (
        torch_threads(config.threads),
        mode(model, training=True),
        seeded(device, jobs[0].seed),
    ):
        while going := [client for client in clients if client.load()]:
            batch, sizes = _joined([client.batch for client in going], fill, task.target)
            with (
                _Own(named, going),
                _OwnDropout(going, batch, fill),
                torch.autocast(device.type, dtype, enabled=dtype is not None),
            ):
                logits = model(**on_device(batch, device)).logits.float()
            losses = [
                task.training_loss(
                    _cut(own[:size], client.batch[task.target]), on_device(client.batch, device)
                )
                for client, own, size in zip(
                    going, logits.view(len(going), -1, *logits.shape[1:]), sizes, strict=True
                )
            ]
            torch.stack(losses).sum().backward()  # type: ignore[no-untyped-call]
            for client, loss in zip(going, losses, strict=True):
                client.update(loss.detach())
    seconds = (time.perf_counter() - start) / sum(client.steps for client in clients)
    return [client.result(seconds) for client in clients]


def _check(model: nn.Module, jobs: Sequence[Job]) -> None:
    if not jobs:
        raise ValueError("expected jobs to train together, got none")
    for key in ("precision", "threads"):
        found = {getattr(job.config, key) for job in jobs}
        if len(found) > 1:
            raise ValueError(f"train.{key}: expected one for all jobs, got {sorted(found)}")
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    held = {id(p) for layer in layers for p in layer.parameters(recurse=False)}
    others = [n for n, p in model.named_parameters() if p.requires_grad and id(p) not in held]
    if others:
        raise ValueError(
            f"only linear layers can be trained together, but {others[0]!r} is trained as well; "
            "train these clients one after the other"
        )
    named = dict(adapter_parameters(model, "default", all_parameters=False))
    scales = {name: layer.scaling["default"] for name, layer in model.named_modules()
              if "default" in getattr(layer, "lora_A", {})}  # fmt: skip
    for number, job in enumerate(jobs):
        if job.adapter.to_state_dict().keys() != named.keys():
            raise ValueError(f"job {number}: its adapter and what this model trains differ")
        for name, pair in job.adapter.pairs.items():
            if not np.isclose(pair.scale, scales[name]):
                raise ValueError(
                    f"job {number}: expected LoRA scale {scales[name]:g} as in the model, got "
                    f"{pair.scale:g} for {name!r}; convert it (LoraPair.with_scale)"
                )


@dataclass
class _Client:
    """A job in work: its own weights, optimiser, rows and random numbers."""

    job: Job
    named: dict[str, Tensor]
    device: torch.device
    batch: dict[str, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        job = self.job
        self.weights = {}
        for key, value in job.adapter.to_state_dict().items():
            own = value.detach().to(self.device, self.named[key].dtype, copy=True)
            self.weights[key] = own.requires_grad_(self.named[key].requires_grad)
        total, self.steps = amount(job.config, len(job.inputs))
        trained = {key: weight for key, weight in self.weights.items() if weight.requires_grad}
        self.updates = Updates(trained, self.steps, **rates(job.config))
        seed = training_seed(job.message, job.seed)
        self.bits, rng = np.random.SFC64(seed), np.random.default_rng(seed)
        self.batches = batches(job.config, job.inputs, total, rng)
        self.losses = torch.zeros((), dtype=torch.float64, device=self.device)

    def load(self) -> bool:
        """Take the next batch; return whether there is one."""
        found = next(self.batches, None)
        if found is not None:
            self.batch = self.job.inputs.batch(found)
        return found is not None

    def update(self, loss: Tensor) -> None:
        self.updates.step()
        self.losses += loss

    def result(self, seconds: float) -> tuple[TrainOutcome, Adapter]:
        done = TrainOutcome(
            float(self.losses) / self.steps, self.steps, seconds * self.steps, len(self.job.inputs)
        )
        state = {key: weight.detach() for key, weight in self.weights.items()}
        scale = next((pair.scale for pair in self.job.adapter.pairs.values()), 1.0)
        return done, Adapter.from_state_dict(state, scale, check_finite=False)


def _cut(logits: Tensor, wanted: Tensor) -> Tensor:
    """Leave out what only fills up, where something is wanted at every place of a row."""
    return logits[:, : wanted.shape[1]] if wanted.dim() > 1 else logits


def _joined(
    batches: Sequence[dict[str, Tensor]], fill: Mapping[str, int], target: str
) -> tuple[dict[str, Tensor], list[int]]:
    """Return one batch with the same number of rows and the same length for each, and the rows."""
    sizes = [len(batch[target]) for batch in batches]
    for batch, size in zip(batches, sizes, strict=True):
        if odd := [name for name, tensor in batch.items() if len(tensor) != size]:
            raise ValueError(
                f"expected tensors with as many rows as {target!r}, and {odd[0]!r} has "
                f"{len(batch[odd[0]])} for {size}; train these clients one after the other"
            )

    def widened(tensor: Tensor, width: int, value: int) -> Tensor:
        missing = width - tensor.shape[1]
        wide = functional.pad(tensor, (0, missing), value=value) if missing else tensor
        # Rows that only fill up are some that there are: a row of padding alone may give NaN.
        return torch.cat([wide, wide[:1].expand(max(sizes) - len(wide), *wide.shape[1:])])

    joined = {}
    for name in batches[0].keys() - {target}:
        tensors = [batch[name] for batch in batches]
        width = max(tensor.shape[1] for tensor in tensors)
        joined[name] = torch.cat([widened(t, width, fill.get(name, 0)) for t in tensors])
    return joined, sizes


class _Own(TorchFunctionMode):
    """Inside the block, the trained linear layers multiply by each client's own weights."""

    def __init__(self, named: dict[str, Tensor], clients: Sequence[_Client]) -> None:
        super().__init__()
        self.stacks = {
            id(parameter): _stacked([client.weights[key] for client in clients])
            for key, parameter in named.items()
        }

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is functional.linear and id(args[1]) in self.stacks:
            return self._linear(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        weights = self.stacks[id(weight)]
        rows = x.reshape(len(weights), -1, x.shape[-1])
        if bias is None:
            out = torch.bmm(rows, weights.mT)
        else:
            biases = self.stacks.get(id(bias), bias.expand(len(weights), -1))
            out = torch.baddbmm(biases.unsqueeze(1), rows, weights.mT)
        return out.view(*x.shape[:-1], out.shape[-1])


def _stacked(tensors: Sequence[Tensor]) -> Tensor:
    """Stack tensors of different sizes, filled up with zeros to the largest."""
    shape = [max(sizes) for sizes in zip(*(t.shape for t in tensors), strict=True)]
    filled = []
    for tensor in tensors:
        missing = [n - m for n, m in zip(shape, tensor.shape, strict=True)]
        filled.append(functional.pad(tensor, [x for n in reversed(missing) for x in (0, n)]))
    return torch.stack(filled)


class _OwnDropout(QuickDropout):
    """Each client draws what it would draw alone: for its own rows, tokens and no others."""

    def __init__(
        self, clients: Sequence[_Client], joined: Mapping[str, Tensor], fill: Mapping[str, int]
    ) -> None:
        super().__init__(0)
        # Rows of one shape for all have no axis to leave a part of: any will do.
        self.clients, self.name = clients, next(iter(fill), next(iter(joined)))
        self.width = joined[self.name].shape[1]

    def noise(self, shape: torch.Size, dtype: torch.dtype, p: float) -> Tensor:
        found = torch.ones(len(self.clients), shape[0] // len(self.clients), *shape[1:]).to(dtype)
        # Which axes count tokens: of states (rows, tokens, features) one, of attention's shares
        # (rows, heads, tokens, tokens) two.
        axes = {3: (1,), 4: (2, 3)}.get(len(shape), ())
        for client, part in zip(self.clients, found, strict=True):
            rows, places = client.batch[self.name].shape[:2]
            own = [rows, *shape[1:]]
            for axis in axes:
                own[axis] = places if own[axis] == self.width else own[axis]
            part[tuple(slice(n) for n in own)] = draw(client.bits, own, dtype, p)
        return found.view(shape)
