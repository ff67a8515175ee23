"""What a client's training step and an evaluation cost, and what each part of the speed-up gives.

    python -m benchmarks.training_step [--repeat 9] [--steps 3] [--rows 192] [--profile]
    python -m benchmarks.training_step --clients 8
    python -m benchmarks.training_step --decoder

One client of the demo on one thread, or several one after the other and in one batch. The variants
take turns in one process; a ratio is the median over the turns of a variant's time by that of the
first in the same turn.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from benchmarks.measure import machine, table
from fedlora_app import evaluation, training
from fedlora_app.config.keys import LoraConfig, RunConfig, TrainConfig
from fedlora_app.data.partition import shares
from fedlora_app.models.loading import MeanPoolClassifier
from fedlora_app.models.lora import add_lora
from fedlora_app.tasks import TextClassification
from fedlora_app.tasks.text_classification import Tokens
from fedlora_app.together import Job, train_together
from strategies import dropout as dropout_module
from strategies.client import adapter_state, load_adapter
from strategies.dropout import QuickDropout
from strategies.lora import Adapter

BEFORE = "the code before"
NOW = "all that was kept"
WITHOUT_END = 10**9
TINY = "2 layers of width 32, 20 tokens"
HEAD = ("variant", "ms", "ratio", "middle half of the ratios")

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
    return lambda: patch.object(evaluation, "THREAD_TOKENS", count)


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


def changed(run: Callable[[], Any], changes: list[Change]) -> Callable[[], Any]:
    def other() -> None:
        with ExitStack() as stack:
            for change in changes:
                stack.enter_context(change())
            run()

    return other


def ratios(variants: dict[str, Callable[[], Any]], repeat: int) -> list[Any]:
    """Return a row for each variant, with its time by that of the first."""

    def timed(run: Callable[[], Any]) -> float:
        clock = time.perf_counter()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - clock

    for run in variants.values():
        run()
    turns, first = [], next(iter(variants))
    for turn in range(repeat):
        names = list(variants) if turn % 2 else list(reversed(variants))
        turns.append({name: timed(variants[name]) for name in names})
    rows = []
    for name in variants:
        shares = sorted(turn[name] / turn[first] for turn in turns)
        middle = statistics.median(turn[name] for turn in turns)
        quarter = len(shares) // 4
        spread = f"{shares[quarter]:.3f} to {shares[-1 - quarter]:.3f}"
        rows.append((name, f"{1e3 * middle:.0f}", f"{statistics.median(shares):.3f}", spread))
    return rows


def clients_together(count: int, steps: int, repeat: int) -> None:
    """Compare clients one after the other with all in one batch, of two models."""
    names = "one after the other", "in one batch"
    task = TextClassification(RunConfig())
    ranks = [(4, 8, 16, 32)[i % 4] for i in range(count)]
    for what, (model, rows) in {
        "the packaged model": demo_client("float32", 4),
        TINY: tiny_client(),
    }.items():
        model.eval()
        state = {key: tensor.clone() for key, tensor in adapter_state(model).items()}
        start = Adapter.from_state_dict(state, LoraConfig().scale)
        config = TrainConfig(steps=steps, precision="float32")
        jobs = [Job(start.with_rank(r), rows, config, i) for i, r in enumerate(ranks)]

        def alone(model: nn.Module = model, jobs: list[Job] = jobs) -> None:
            for job in jobs:
                load_adapter(model, job.adapter)
                training.train(model, job.inputs, job.config, seed=job.seed)

        runs = dict(zip(names, (alone, partial(train_together, task, model, jobs)), strict=True))
        print(f"{count} clients of {steps} steps, ranks 4 to 32, float32: {what}\n")
        print(table(HEAD, ratios(runs, repeat)))


def decoder(steps: int, repeat: int) -> None:
    """Compare torch's fused attention with the plain formula, in a Llama of six layers."""
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=5000,
        hidden_size=384,
        intermediate_size=1024,
        num_hidden_layers=6,
        num_attention_heads=12,
        num_key_value_heads=4,
        num_labels=4,
        pad_token_id=0,
    )
    base = transformers.LlamaForSequenceClassification(config).to(torch.bfloat16)
    model = add_lora(base, LoraConfig(), rank=8, seed=0)
    rng, settings = np.random.default_rng(0), TrainConfig(steps=steps, precision="bfloat16")
    for length in (32, 64, 128, 256):
        ids, labels = rng.integers(1, 5000, size=(48, length)), rng.integers(4, size=48)
        rows = Tokens(torch.tensor(ids, dtype=torch.int32), np.full(48, length), labels)
        train = partial(training.train, model, rows, settings, seed=1)
        found = {
            name: changed(train, [lambda most=most: patch.object(dropout_module, "SHORT", most)])
            for name, most in (("fused", 0), ("plain", length))
        }
        print(f"{steps} training steps, bfloat16, Llama of 6 layers, {length} tokens\n")
        print(table(HEAD, ratios(found, repeat)))


def tiny_client() -> tuple[nn.Module, Tokens]:
    import transformers

    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    model = MeanPoolClassifier(transformers.AutoModel.from_config(config), 3)
    rng = np.random.default_rng(0)
    ids, labels = rng.integers(1, 50, size=(60, 20)), rng.integers(3, size=60)
    rows = Tokens(torch.tensor(ids, dtype=torch.int32), np.full(60, 20), labels)
    return add_lora(model, LoraConfig(), rank=4, seed=0), rows


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


def demo_client(precision: str, rank: int) -> tuple[nn.Module, Tokens]:
    task = TextClassification(RunConfig())
    data = task.train_rows()
    rows = task.encode(data.take(shares(task, data, 10)[3]))
    base = task.model(data.about, seed=42, precision=precision)
    return add_lora(base, LoraConfig(), rank=rank, seed=42), rows


def compare_training(
    title: str,
    model: nn.Module,
    rows: Tokens,
    config: TrainConfig,
    args: argparse.Namespace,
) -> None:
    train = partial(training.train, model, rows, config, seed=1)
    print(f"{config.steps} training steps, {config.precision}, {title}\n")
    variants = train_variants(model, config.precision)
    found = {name: changed(train, changes) for name, changes in variants.items()}
    print(table(HEAD, ratios(found, args.repeat)))
    if args.profile:
        with torch.profiler.profile() as profile:
            train()
        events = profile.key_averages(group_by_input_shape=True)
        print(events.table(sort_by="self_cpu_time_total", row_limit=25))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--repeat", type=int, default=9)
    parser.add_argument("--steps", type=int, default=3, help="of one training")
    parser.add_argument("--rows", type=int, default=192, help="of one evaluation")
    parser.add_argument("--ranks", default="4,32")
    parser.add_argument("--clients", type=int, default=0, help="compare so many in one batch")
    parser.add_argument("--decoder", action="store_true", help="compare attention without dropout")
    parser.add_argument("--profile", action="store_true", help="torch's profile of a step as well")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{machine()}\n")
    if args.decoder:
        decoder(args.steps, args.repeat)
        return
    if args.clients:
        clients_together(args.clients, args.steps, args.repeat)
        return
    for precision in ("bfloat16", "float32"):
        for rank in map(int, args.ranks.split(",")):
            model, rows = demo_client(precision, rank)
            config = TrainConfig(steps=args.steps, precision=precision)
            compare_training(f"rank {rank}", model, rows, config, args)
        few = rows.take(range(min(args.rows, len(rows))))
        task = TextClassification(RunConfig())
        evaluate = partial(
            evaluation.per_sample_losses, task, model, few, batch_size=64, precision=precision
        )
        print(f"Evaluation of {len(few)} rows, {precision}\n")
        found = {n: changed(evaluate, c) for n, c in evaluate_variants(model, precision).items()}
        print(table(HEAD, ratios(found, args.repeat)))
        Packed.known.clear()
    config = TrainConfig(steps=10 * args.steps, precision="float32")
    args.repeat *= 3  # a turn takes a blink
    compare_training(TINY, *tiny_client(), config, args)


if __name__ == "__main__":
    main()
