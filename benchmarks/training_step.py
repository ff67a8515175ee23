"""What a client's training step and an evaluation cost, and what each part of the speed-up gives.

    python -m benchmarks.training_step [--repeat 9] [--steps 3] [--rows 192] [--profile]

One client of the demo on one thread. The variants take turns in one process; a ratio is the
median over the turns of a variant's time by that of the code before in the same turn.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from benchmarks.measure import machine, table
from fedlora_app import training
from fedlora_app.config import DataConfig, LoraConfig, ModelConfig, TrainConfig
from fedlora_app.data import TokenizedRows, load_train, partition_indices, tokenize
from fedlora_app.dropout import QuickDropout
from fedlora_app.models import add_lora, build_model, build_tokenizer

BEFORE = "the code before"
NOW = "all that was kept"
WITHOUT_END = 10**9

Change = Callable[[], Any]


class DropoutAlone(QuickDropout):
    def _attention(self, *args: Any, **kwargs: Any) -> None:
        return None


class AttentionAlone(QuickDropout):
    def _dropout(self, *args: Any, **kwargs: Any) -> None:
        return None


def dropout(kind: type[QuickDropout] | None) -> Change:
    made = nullcontext if kind is None else partial(kind, 0)
    return lambda: patch.object(training, "_dropout", lambda *_: made())


def adam(**flags: bool) -> Change:
    made = torch.optim.AdamW

    def other(groups: Any, **settings: Any) -> torch.optim.AdamW:
        return made(groups, **{**settings, "fused": False, **flags})

    return lambda: patch.object(torch.optim, "AdamW", other)


def clipping() -> Any:
    return patch.object(
        nn.utils, "clip_grad_norm_", partial(nn.utils.clip_grad_norm_, foreach=True)
    )


def tokens(count: int) -> Change:
    return lambda: patch.object(training, "THREAD_TOKENS", count)


@contextmanager
def uncast(model: nn.Module) -> Iterator[None]:
    """Let autocast alone decide: PEFT turns each input to float32, and autocast turns it back."""
    layers = [module for module in model.modules() if hasattr(module, "lora_A")]
    for layer in layers:
        layer.cast_input_dtype_enabled = False  # type: ignore[assignment]
    yield
    for layer in layers:
        layer.cast_input_dtype_enabled = True  # type: ignore[assignment]


class Packed(TorchFunctionMode):
    """Frozen weights laid out for oneDNN once, for both ways: twice the memory, private names."""

    known: dict[int, tuple[Tensor, Tensor, Tensor]] = {}  # noqa: RUF012

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        frozen = func is functional.linear and len(args) == 3 and not args[1].requires_grad
        if not frozen or args[2] is None or args[0].dtype != args[1].dtype:
            return func(*args, **(kwargs or {}))
        x, weight, bias = args
        if id(weight) not in self.known:
            order = torch.ops.mkldnn._reorder_linear_weight
            ways = weight.detach(), weight.detach().t().contiguous()
            self.known[id(weight)] = (weight, order(ways[0], 768), order(ways[1], 768))
        _, there, back = self.known[id(weight)]
        return PackedLinear.apply(x, bias, there, back)  # type: ignore[no-untyped-call]


class PackedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor, there: Tensor, back: Tensor) -> Any:
        ctx.back = back
        return torch.ops.mkldnn._linear_pointwise(x, there, bias, "none", [], "")

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        product = torch.ops.mkldnn._linear_pointwise
        return product(grad.contiguous(), ctx.back, None, "none", [], ""), None, None, None


def ratios(run: Callable[[], Any], variants: dict[str, list[Change]], repeat: int) -> list[Any]:
    """Return a row for each variant; the first is the code before."""

    def timed(changes: list[Change]) -> float:
        with ExitStack() as stack:
            for change in changes:
                stack.enter_context(change())
            clock = time.perf_counter()
            run()
            return time.perf_counter() - clock

    for changes in variants.values():
        timed(changes)
    turns = []
    for turn in range(repeat):
        names = list(variants) if turn % 2 else list(reversed(variants))
        turns.append({name: timed(variants[name]) for name in names})
    rows = []
    for name in variants:
        shares = sorted(turn[name] / turn[BEFORE] for turn in turns)
        middle = statistics.median(turn[name] for turn in turns)
        quarter = len(shares) // 4
        spread = f"{shares[quarter]:.3f} to {shares[-1 - quarter]:.3f}"
        rows.append((name, f"{1e3 * middle:.0f}", f"{statistics.median(shares):.3f}", spread))
    return rows


def train_variants(model: nn.Module, precision: str) -> dict[str, list[Change]]:
    old = [dropout(None), adam()]
    found = {
        BEFORE: old,
        NOW: [],
        "dropout of 16 bits": [dropout(DropoutAlone), adam()],
        "attention with that dropout": [dropout(AttentionAlone), adam()],
        "fused AdamW": [dropout(None)],
        "AdamW foreach": [dropout(None), adam(foreach=True)],
        "clipping foreach": [*old, clipping],
        "frozen weights packed": [*old, Packed],
    }
    if precision == "bfloat16":
        found["LoRA inputs not cast to and fro"] = [*old, lambda: uncast(model)]
    return found


def evaluate_variants(model: nn.Module, precision: str) -> dict[str, list[Change]]:
    old = [tokens(WITHOUT_END)]
    found = {
        BEFORE: old,
        NOW: [],
        "at most 512 tokens": [tokens(512)],
        "at most 2048 tokens": [tokens(2048)],
    }
    if precision == "bfloat16":
        found["LoRA inputs not cast to and fro"] = [*old, lambda: uncast(model)]
    return found


def demo_client(precision: str, rank: int) -> tuple[nn.Module, TokenizedRows]:
    data = load_train(DataConfig())
    share = partition_indices(data.labels, DataConfig(), num_clients=10, seed=42)[3]
    rows = tokenize(data.take(share), build_tokenizer(ModelConfig()), DataConfig().max_length)
    base = build_model(
        ModelConfig(), num_labels=len(data.label_names), seed=42, precision=precision
    )
    return add_lora(base, LoraConfig(), rank=rank, seed=42), rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--repeat", type=int, default=9)
    parser.add_argument("--steps", type=int, default=3, help="of one training")
    parser.add_argument("--rows", type=int, default=192, help="of one evaluation")
    parser.add_argument("--ranks", default="4,32")
    parser.add_argument("--profile", action="store_true", help="torch's profile of a step as well")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{machine()}\n")
    head = ("variant", "ms", "ratio", "middle half of the ratios")
    for precision in ("bfloat16", "float32"):
        for rank in map(int, args.ranks.split(",")):
            model, rows = demo_client(precision, rank)
            config = TrainConfig(steps=args.steps, precision=precision)
            train = partial(training.train, model, rows, config, seed=1)
            print(f"{args.steps} training steps, {precision}, rank {rank}\n")
            print(table(head, ratios(train, train_variants(model, precision), args.repeat)))
            if args.profile:
                with torch.profiler.profile() as profile:
                    train()
                found = profile.key_averages(group_by_input_shape=True)
                print(found.table(sort_by="self_cpu_time_total", row_limit=25))
        few = rows.take(range(min(args.rows, len(rows))))
        evaluate = partial(
            training.per_sample_losses, model, few, batch_size=64, precision=precision
        )
        print(f"Evaluation of {len(few)} rows, {precision}\n")
        print(table(head, ratios(evaluate, evaluate_variants(model, precision), args.repeat)))
        Packed.known.clear()


if __name__ == "__main__":
    main()
