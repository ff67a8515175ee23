"""The server: Flower's template with another strategy, and what a language model is judged by."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from datetime import datetime
from logging import INFO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.common import log
from flwr.serverapp import Grid, ServerApp
from torch.utils.data import DataLoader
from transformers import DataCollatorForSeq2Seq

from flowertune_llm.data import Question, Row, load_split, prompt
from flowertune_llm.model import build_model, build_tokenizer
from strategies import FedLoRA
from strategies.client import adapter_state, load_adapter
from strategies.messages import from_record, to_record
from strategies.model import GlobalModel
from strategies.ranks import ReportedRank

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Tune, and write down loss, perplexity and a sample from before and after."""
    run = context.run_config
    name, seed, scale = str(run["model"]), int(run["seed"]), float(run["scale"])
    max_rank = max(int(rank) for rank in str(run["device-ranks"]).split(","))
    split = load_split(str(run["data"]), name, int(run["max-length"]), int(run["test-rows"]), seed)
    model = build_model(name, rank=max_rank, scale=scale, seed=seed)
    tokenizer = build_tokenizer(name)
    folder = Path(str(run["output"]) or f"runs/{datetime.now():%Y-%m-%d_%H-%M-%S}-llm")
    folder.mkdir(parents=True, exist_ok=True)
    metrics = folder / "metrics.jsonl"
    scores: dict[int, dict[str, float]] = {}
    samples: dict[int, str] = {}
    rounds, asked = int(run["rounds"]), split.test_questions[0]

    def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        # As one adapter, whatever the rule: some merge a part into the base.
        whole = GlobalModel.from_tensors(from_record(arrays), scale).combined()
        load_adapter(model, whole)
        found = scores[server_round] = perplexity(model, split.test, tokenizer)
        if server_round in (0, rounds):
            samples[server_round] = generate(model, asked, tokenizer, int(run["sample-tokens"]))
        log(INFO, "round %s: held-out answers, %s", server_round, _text(found))
        return MetricRecord(found)  # type: ignore[arg-type]

    def write(record: Mapping[str, Any]) -> None:
        with metrics.open("a", encoding="utf-8") as file:
            print(json.dumps(record), file=file)

    strategy = FedLoRA(
        aggregation=str(run["aggregation"]),
        ranks=ReportedRank(max_rank),
        scale=scale,
        seed=seed,
        min_available_nodes=int(run["min-nodes"]),
        evaluate_fraction=0,
        listeners=[write],
    )
    strategy.start(
        grid=grid,
        initial_arrays=to_record(adapter_state(model)),
        num_rounds=rounds,
        evaluate_fn=evaluate,
    )
    model.save_pretrained(folder / "adapter")
    (folder / "summary.json").write_text(json.dumps({"rounds": scores}, indent=1), "utf-8")
    (folder / "sample.md").write_text(_sample_page(asked, scores, samples), "utf-8")
    log(INFO, "before: %s; after: %s", _text(scores[0]), _text(scores[rounds]))
    log(INFO, "outputs in %s", folder)


@torch.inference_mode()
def perplexity(
    model: PeftModel, rows: list[Row], tokenizer: PreTrainedTokenizerBase, batch_size: int = 4
) -> dict[str, float]:
    """Return the mean loss of the answers' tokens, and ``exp`` of it."""
    model.eval()
    total, tokens = 0.0, 0
    for batch in DataLoader(rows, batch_size, collate_fn=DataCollatorForSeq2Seq(tokenizer)):  # type: ignore[arg-type]
        count = int((batch["labels"][:, 1:] >= 0).sum())
        total += float(model(**batch.to(model.device)).loss) * count
        tokens += count
    return {"loss": total / tokens, "perplexity": math.exp(total / tokens)}


@torch.inference_mode()
def generate(
    model: PeftModel, asked: Question, tokenizer: PreTrainedTokenizerBase, tokens: int
) -> str:
    """Return the model's most likely answer to a question."""
    model.eval()
    start = torch.tensor([prompt(asked.question, tokenizer)], device=model.device)
    made = model.generate(
        input_ids=start,
        attention_mask=torch.ones_like(start),
        max_new_tokens=tokens,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
    )
    return str(tokenizer.decode(made[0, start.shape[1] :], skip_special_tokens=True)).strip()


def _text(score: Mapping[str, float]) -> str:
    return f"loss {score['loss']:.3f} perplexity {score['perplexity']:.2f}"


def _sample_page(
    asked: Question, scores: Mapping[int, Mapping[str, float]], samples: Mapping[int, str]
) -> str:
    parts = [f"# A held-out question\n\n{asked.question}", f"## Its answer\n\n{asked.answer}"]
    parts += [
        f"## After round {number} ({_text(scores[number])})\n\n{text}"
        for number, text in samples.items()
    ]
    return "\n\n".join(parts) + "\n"
