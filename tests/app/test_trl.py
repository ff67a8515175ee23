"""Contracts with TRL's real classes: the same tokens are trained, and its trainer federates."""

import itertools

import numpy as np
import peft
import pytest
import torch
import transformers
from datasets import Dataset
from flwr.app import Context, RecordDict

from fedlora_app.data.conversations import marks_answers
from fedlora_app.tasks import make_task
from strategies import FedLoRA
from strategies.client import PROFILED_KEY, adapter_state, apply_adapter, make_reply
from strategies.huggingface import FedLoRACallback, train_with_trainer
from strategies.messages import to_record
from strategies.profiling import PROFILE_KEY
from strategies.ranks import ListRank
from tests.app.test_language import CHAT, TEMPLATE, WORDS, config, folder, written  # noqa: F401
from tests.fakes import FakeGrid

MARKED = (
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}</s>{% endgeneration %}{% else %}{{ m.content }}</s>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def conversations(count=30, seed=0):
    """Return rows of one to four exchanges, some with a system turn, of random words."""
    rng = np.random.default_rng(seed)

    def words():
        return " ".join(rng.choice(WORDS, rng.integers(1, 5)))

    rows = []
    for i in range(count):
        turns = [{"role": "system", "content": words()}] if i % 3 == 0 else []
        for _ in range(rng.integers(1, 4)):
            turns.append({"role": "user", "content": words()})
            turns.append({"role": "assistant", "content": words()})
        rows.append({"messages": turns})
    return [{"messages": CHAT}, *rows]


def masks(folder, path, template):  # noqa: F811
    """Return token ids and labels of each row as our task makes them."""
    task = make_task(config(folder, path, **{"data.max-length": 64, "data.test-rows": 0}))
    task.tokenizer.chat_template = template
    table = next(iter(task.splits(str(path)).values()))
    inputs = task.encode(task.rows(table, None, "rows"))
    return [(ids.tolist(), labels.tolist())
            for ids, labels in zip(inputs.ids, inputs.labels, strict=True)]  # fmt: skip


def test_spans_that_are_found_are_those_that_a_template_marks(folder, tmp_path):  # noqa: F811
    path = written(tmp_path, conversations())
    assert (marks_answers(MARKED), marks_answers(TEMPLATE)) == (True, False)
    assert masks(folder, path, MARKED) == masks(folder, path, TEMPLATE)


def trl():
    return pytest.importorskip("trl", reason="TRL is not installed")


def settings(tmp_path, **more):
    return trl().SFTConfig(
        output_dir=str(tmp_path), use_cpu=True, report_to="none", max_length=64,
        disable_tqdm=True, logging_strategy="no", **more,
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["messages", "prompt and completion"])
def test_our_masks_are_those_of_trl(folder, tmp_path, kind):  # noqa: F811
    rows = conversations()
    if kind != "messages":
        rows = [{"prompt": row["messages"][-2]["content"],
                 "completion": row["messages"][-1]["content"]} for row in rows]  # fmt: skip
    path = written(tmp_path, rows)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = MARKED
    theirs = rows
    if kind != "messages":  # TRL renders the turns of a template for conversations alone
        theirs = [{"prompt": [{"role": "user", "content": row["prompt"]}],
                   "completion": [{"role": "assistant", "content": row["completion"]}]}
                  for row in rows]  # fmt: skip
    trainer = trl().SFTTrainer(
        transformers.AutoModelForCausalLM.from_pretrained(folder),
        settings(tmp_path, assistant_only_loss=kind == "messages"),
        train_dataset=Dataset.from_list(theirs),
        processing_class=tokenizer,
    )
    expected = [(row["input_ids"], row["labels"]) for row in trainer.train_dataset]
    for template in (MARKED, TEMPLATE):
        assert masks(folder, path, template) == expected


def test_the_loss_of_pairs_is_that_of_the_dpo_trainer(folder, tmp_path):  # noqa: F811
    rows = [
        {"prompt": [{"role": "user", "content": f"what is {WORDS[i]}"}],
         "chosen": [{"role": "assistant", "content": WORDS[i + 1]}],
         "rejected": [{"role": "assistant", "content": f"{WORDS[i + 2]} again {WORDS[i]}"}]}
        for i in range(6)
    ]  # fmt: skip
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = MARKED
    model = lora(folder)
    args = trl().DPOConfig(
        output_dir=str(tmp_path), use_cpu=True, report_to="none", max_length=64, beta=0.3,
        disable_tqdm=True, logging_strategy="no", gradient_checkpointing=False, bf16=False,
    )  # fmt: skip
    trainer = trl().DPOTrainer(
        model, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
    )
    rng = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():  # only now: their reference is the start
        if "lora_B" in name and "ref" not in name:
            parameter.data = 0.5 * torch.randn(parameter.shape, generator=rng)
    state = adapter_state(model)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(6)])
    with torch.no_grad():
        theirs = float(trainer.compute_loss(model.eval(), batch))

    path = written(tmp_path, rows)
    flat = {"train.beta": 0.3, "data.max-length": 64, "data.test-rows": 0}
    task = make_task(config(folder, path, task="preference", **flat))
    task.tokenizer.chat_template = MARKED
    table = next(iter(task.splits(str(path)).values()))
    inputs = task.encode(task.rows(table, None, "rows"))
    how = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
    ours = peft.get_peft_model(task.model({}, seed=0), how)
    peft.set_peft_model_state_dict(ours, {k: torch.as_tensor(v) for k, v in state.items()})
    with torch.no_grad():
        own = float(ours.eval()(**inputs.batch(range(6))).loss)
    assert abs(own - np.log(2)) > 0.01  # the adapter does something
    assert own == pytest.approx(theirs, rel=1e-5)


def lora(folder, rank=4):  # noqa: F811
    base = transformers.AutoModelForCausalLM.from_pretrained(folder)
    how = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["q_proj", "v_proj"])
    torch.manual_seed(0)
    return peft.get_peft_model(base, how)


@pytest.mark.parametrize("way", ["one call", "a callback"])
def test_the_sft_trainer_federates_clients_of_unequal_rank(folder, tmp_path, way):  # noqa: F811
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = MARKED
    rows = Dataset.from_list(conversations(16))
    resident, seen, losses = lora(folder, rank=1), [], []
    batch = {key: torch.tensor([tokenizer("two and two is four")["input_ids"]])
             for key in ("input_ids", "labels")}  # fmt: skip

    def client(message):
        context = Context(1, message.metadata.dst_node_id, {}, RecordDict(), {})
        told = apply_adapter(resident, message, context)
        if message.metadata.message_type == "evaluate":
            return make_reply(resident, message, num_examples=2, loss=1.0).content
        told = {**told, PROFILE_KEY: True}
        args = settings(tmp_path, assistant_only_loss=True, max_steps=3, learning_rate=0.05,
                        per_device_train_batch_size=4, save_strategy="no")  # fmt: skip
        if way == "one call":
            done = train_with_trainer(
                resident, rows, told, args=args, state=context.state,
                trainer_class=trl().SFTTrainer, processing_class=tokenizer,
            )  # fmt: skip
            assert resident(**batch).logits is not None  # and not TRL's forward, which has none
            assert not any(getattr(m, "gradient_checkpointing", False) for m in resident.modules())
        else:
            reporter = FedLoRACallback(told, context.state)
            trl().SFTTrainer(resident, args, train_dataset=rows, processing_class=tokenizer,
                             callbacks=[reporter]).train()  # fmt: skip
            done = reporter.outcome()
        assert done.num_examples == len(rows)
        assert PROFILED_KEY in context.state
        losses.append(done.loss)
        return make_reply(resident, message, num_examples=done.num_examples,
                          metrics=done.metrics(), context=context).content  # fmt: skip

    initial = {key: value.clone() for key, value in adapter_state(lora(folder)).items()}
    strategy = FedLoRA(
        query=False, aggregation="replication", ranks=ListRank([2, 4]), scale=2.0,
        listeners=[seen.append],
    )  # fmt: skip
    result = strategy.start(FakeGrid([1, 2], client), to_record(initial), num_rounds=3)
    done = [record for record in seen if record["kind"] == "client"]
    assert [record["rank"] for record in done] == [2, 4] * 3
    assert all(record["status"] == "ok" and record["steps"] == 3 for record in done), done
    after = {key: torch.from_numpy(array.numpy().copy()) for key, array in result.arrays.items()}
    assert all(not torch.equal(after[key], value) for key, value in initial.items())
    first, *_, last = itertools.batched(losses, 2) if hasattr(itertools, "batched") else (
        losses[:2], losses[-2:])  # fmt: skip
    assert sum(last) < sum(first)


def test_a_quantised_adapter_keeps_its_type(folder, tmp_path):  # noqa: F811
    pytest.importorskip("bitsandbytes", reason="the extra [quantization]")
    few = transformers.BitsAndBytesConfig(load_in_4bit=True)
    base = transformers.AutoModelForCausalLM.from_pretrained(folder, quantization_config=few)
    base = peft.prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = MARKED
    args = settings(tmp_path, assistant_only_loss=True, max_steps=1, save_strategy="no")
    train_with_trainer(model, Dataset.from_list(conversations(8)), args=args,
                       trainer_class=trl().SFTTrainer, processing_class=tokenizer)  # fmt: skip
    assert {value.dtype for value in adapter_state(model).values()} == {torch.float32}
