"""What a training step of a language model costs: beside a bare loop, beside TRL, packed, in bits.

    python -m benchmarks.language [--steps 4] [--rows 8] [--repeat 5] [--length 192]
    python -m benchmarks.language --shape qwen2.5-0.5b --rows 16 --length 512     # with a GPU

One client's rows of GSM8K on SmolLM2-135M-Instruct, or random rows of like lengths on random
weights of another model's shape. All see the same rows. Those that are compared take turns in one
process, and a ratio is the median over the turns; each base of few bits has a process of its own,
for its peak of memory.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.measure import machine, table
from benchmarks.training_step import HEAD, ratios
from fedlora_app import training
from fedlora_app.config.keys import RunConfig, TrainConfig
from fedlora_app.models.lora import add_lora
from fedlora_app.tasks import Task, make_task
from fedlora_app.tasks.base import Inputs
from fedlora_app.tasks.sequences import Sequences
from strategies.losses import autocast_type, on_device
from strategies.memory import PHASES, PhaseMemory

SHAPES = {
    "qwen2.5-0.5b": {
        "vocab_size": 151_936, "hidden_size": 896, "intermediate_size": 4864,
        "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    "tiny": {
        "vocab_size": 1000, "hidden_size": 128, "intermediate_size": 256,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    },
}  # fmt: skip
#: Bases that are compared: the name, its precision, its quantisation.
BASES = {"float32": "none", "bfloat16": "none", "8bit": "8bit", "4bit": "4bit"}


def config(args: argparse.Namespace, **more: Any) -> RunConfig:
    flat = {"task": "causal-lm", "model.name": args.model, "data.name": "packaged:gsm8k",
            "data.partition": "iid", "data.max-length": args.length,
            "lora.target-modules": args.targets, "train.precision": args.precision}  # fmt: skip
    return RunConfig.from_flat({**flat, **more})


def made(args: argparse.Namespace, task: Task) -> tuple[nn.Module, Sequences]:
    """Return a model with LoRA, and the rows of all steps."""
    told, count = task.config, args.steps * args.rows
    base = task.model({}, seed=0, precision=told.train.precision)
    if args.shape:
        rows = random_rows(count, args.length, SHAPES[args.shape]["vocab_size"])
    else:
        rows = task.encode(task.train_rows().take(range(count)))
    return add_lora(base, told.lora, rank=args.rank, seed=0).to(training.default_device()), rows


def random_rows(count: int, longest: int, vocabulary: int) -> Sequences:
    """Return rows of random tokens, a half to all of ``longest`` long, two thirds of it trained."""
    rng = np.random.default_rng(0)
    ids = [rng.integers(5, vocabulary, n, dtype=np.int32)
           for n in rng.integers(longest // 4, longest + 1, count)]  # fmt: skip
    labels = [np.where(np.arange(len(row)) * 3 >= len(row), row, -100) for row in ids]
    return Sequences(ids, [row.astype(np.int32) for row in labels], 0)


def keys(args: argparse.Namespace) -> TrainConfig:
    return TrainConfig(
        steps=args.steps, batch_size=args.rows, precision=args.precision,
        learning_rate=1e-3, threads=torch.get_num_threads(),
    )  # fmt: skip


def bare(model: nn.Module, batches: list[dict[str, Any]], precision: str) -> None:
    """Train in a loop as one writes it by hand."""
    dtype, device = autocast_type(precision), next(model.parameters()).device
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.0, fused=True)
    model.train()
    for batch in batches:
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            loss = model(**on_device(batch, device)).loss
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()


def by_trl(
    model: nn.Module, rows: Sequences, args: argparse.Namespace, loss: str
) -> Callable[[], Any]:
    """Return TRL's training of the same rows; its trainer is made beforehand."""
    from datasets import Dataset
    from transformers import AutoTokenizer, PrinterCallback
    from trl import SFTConfig, SFTTrainer

    settings = SFTConfig(
        output_dir=tempfile.mkdtemp(), use_cpu=not torch.cuda.is_available(), report_to="none",
        per_device_train_batch_size=args.rows, max_steps=args.steps, learning_rate=1e-3,
        lr_scheduler_type="constant", gradient_checkpointing=False, max_length=args.length,
        bf16=args.precision == "bfloat16", logging_strategy="no", save_strategy="no",
        disable_tqdm=True, loss_type=loss, dataloader_pin_memory=False,
    )  # fmt: skip
    held = Dataset.from_dict({"input_ids": [row.tolist() for row in rows.ids],
                              "labels": [row.tolist() for row in rows.labels]})  # fmt: skip
    before = {id(m): m.__dict__.get("forward") for m in model.modules()}
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    trainer = SFTTrainer(model, settings, train_dataset=held, processing_class=tokenizer)
    trainer.remove_callback(PrinterCallback)
    # What TRL puts on the model holds while TRL trains, and not for the others.
    patched = {module: module.__dict__.pop("forward") for module in model.modules()
               if module.__dict__.get("forward") is not before[id(module)]}  # fmt: skip

    def run() -> None:
        for module, forward in patched.items():
            module.__dict__["forward"] = forward
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer.train()
        for module in model.modules():
            module.__dict__.pop("forward", None)

    return run


def steps(args: argparse.Namespace) -> None:
    """Compare a training of ours with a bare loop and with TRL's trainer."""
    task = make_task(config(args))
    model, rows = made(args, task)
    settings, inputs = keys(args), task.for_training(rows)
    order = training.batches(settings, inputs, len(rows), np.random.default_rng(1))
    batches = [rows.batch(chosen) for chosen in order]
    variants: dict[str, Callable[[], Any]] = {
        "a bare loop": partial(bare, model, batches, args.precision),
        "ours": partial(training.train, model, inputs, settings, seed=1),
    }
    for loss in ("nll", "chunked_nll") if args.trl else ():
        variants[f"TRL's SFTTrainer, {loss}"] = by_trl(model, rows, args, loss)
    print(f"{args.steps} steps of {args.rows} rows, {args.precision}\n")
    print(measured(variants, args.repeat, int(rows.sizes.sum())))


def measured(variants: dict[str, Callable[[], Any]], repeat: int, tokens: int) -> str:
    """Return a table of times, tokens a second and, on a GPU, peaks of its memory."""
    rows = [[*row, f"{tokens / float(row[1]) * 1e3:,.0f}"] for row in ratios(variants, repeat)]
    head = [*HEAD, "tokens/s"]
    if torch.cuda.is_available():
        head.append("peak MB")
        for row in rows:
            torch.cuda.reset_peak_memory_stats()
            variants[row[0]]()
            row.append(f"{torch.cuda.max_memory_allocated() / 1e6:,.0f}")
    return table(head, rows)


def packing(args: argparse.Namespace) -> None:
    """Compare tokens a second with and without padding."""
    found: dict[str, Inputs] = {}
    for name, packed in (("padded", False), ("packed", True)):
        task = make_task(config(args, **{"data.packing": packed}))
        model, rows = made(args, task)
        found[name] = task.for_training(rows)
    tokens, settings = int(rows.sizes.sum()), keys(args)
    by_length = TrainConfig(**{**vars(settings), "group_by_length": True})
    variants = {
        "padded": partial(training.train, model, found["padded"], settings, seed=1),
        "grouped by length": partial(training.train, model, found["padded"], by_length, seed=1),
        "packed": partial(training.train, model, found["packed"], settings, seed=1),
    }
    print(f"{tokens} tokens in {len(rows)} rows, {args.precision}\n")
    print(measured(variants, args.repeat, tokens))


def memory(args: argparse.Namespace, kind: str) -> dict[str, float]:
    """Return loss, seconds and peak memory by phase of a training on a base of so many bits."""
    precision = "float32" if kind == "float32" else "bfloat16"
    told = config(args, **{"model.quantization": BASES[kind], "train.precision": precision})
    watch = PhaseMemory(training.default_device())
    with watch.phase("load"):
        task = make_task(told)
        model, rows = made(args, task)
    settings = TrainConfig(**{**vars(keys(args)), "precision": precision})
    first = training.train(model, task.for_training(rows), settings, seed=1)
    done = training.train(model, task.for_training(rows), settings, seed=1)
    return {"start": first.loss, "loss": done.loss, "seconds": done.seconds,
            **watch.peaks, **done.memory}  # fmt: skip


def few_bits(args: argparse.Namespace) -> None:
    """Compare bases of 32, 16, 8 and 4 bits, each in a process of its own."""
    rows = []
    for kind in BASES:
        command = [sys.executable, "-m", "benchmarks.language", *sys.argv[1:], "--bits", kind]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            print(done.stderr, file=sys.stderr)
            continue
        found = json.loads(done.stdout.splitlines()[-1])
        peaks = [f"{found[f'memory_{phase}_mb']:,.0f}" for phase in PHASES]
        losses = f"{found['start']:.3f}", f"{found['loss']:.3f}"
        rows.append((kind, *losses, f"{found['seconds']:.1f}", *peaks))
    print(f"{args.steps} steps of {args.rows} rows, and {args.steps} more on the same\n")
    print(table(("base", "loss", "loss of the second pass", "s", "MB: load", "forward", "backward",
                 "optimiser"), rows))  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--steps", type=int, default=4, help="of one training")
    parser.add_argument("--rows", type=int, default=8, help="of a step")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--length", type=int, default=192, help="tokens of a row at most")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--targets", default="auto", help="as lora.target-modules")
    parser.add_argument("--precision", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--model", default="packaged:smollm2-135m")
    parser.add_argument("--shape", default="", choices=("", *SHAPES), help="random weights instead")
    parser.add_argument("--only", default="steps,packing,bits", help="some of these")
    parser.add_argument("--bits", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    import importlib.util

    args.trl = importlib.util.find_spec("trl") is not None
    with tempfile.TemporaryDirectory() as folder:
        prepare(args, Path(folder))
        if args.bits:
            print(json.dumps(memory(args, args.bits)))
            return
        print(f"{machine()}\n", flush=True)
        for name, compare in (("steps", steps), ("packing", packing), ("bits", few_bits)):
            if name in args.only.split(","):
                compare(args)


def prepare(args: argparse.Namespace, folder: Path) -> None:
    """Name the tokenizer; save random weights of a shape where one is asked for."""
    from fedlora_app.models.pretrained import locate

    args.tokenizer = locate(args.model)[0] if not args.shape else ""
    if not args.shape:
        return
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    settings = transformers.LlamaConfig(**SHAPES[args.shape], pad_token_id=0, eos_token_id=1,
                                        max_position_embeddings=4096)  # fmt: skip
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(settings).to(torch.bfloat16).save_pretrained(folder)
    raw = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1, "<unk>": 2, "a": 3}, "<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    args.model = args.tokenizer = str(folder)


if __name__ == "__main__":
    main()
