"""Logits of what is trained alone: the same loss and gradients, and fewer numbers."""

import pytest
import torch
import transformers

from fedlora_app.config.keys import LoraConfig, TrainConfig
from fedlora_app.models.lora import add_lora
from fedlora_app.tasks import loss_in_parts, make_task
from fedlora_app.tasks.answers import AnswersAlone, takes_few_logits, takes_parts
from fedlora_app.tasks.packing import Packed
from fedlora_app.together import Job, train_together
from fedlora_app.training import train
from strategies.client import adapter_state, load_adapter
from strategies.lora import Adapter
from tests.app.test_language import config, folder, written  # noqa: F401
from tests.app.test_packing import gpt2, llama, sequences, sliding


@pytest.mark.parametrize("make", [llama, gpt2, sliding])
@pytest.mark.parametrize("packed", [False, True])
def test_loss_and_gradients_are_those_of_all_logits(make, packed):
    model = add_lora(make(), LoraConfig(), rank=2, seed=0).double()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(len(name)))
    rows, found = sequences(), []
    inputs = Packed(rows, 40) if packed else rows
    for these in (inputs, AnswersAlone(inputs)):
        batch = these.take(range(12)).batch([1, 2, 3, 5, 8])
        out = model(**batch)
        out.loss.backward()
        found.append((out, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
        model.zero_grad(set_to_none=True)
    (whole, gradients), (part, others) = found
    assert part.logits.shape[1] < whole.logits.shape[1]
    assert float(part.loss) == pytest.approx(float(whole.loss), rel=1e-6)
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("parts", [False, True])
def test_a_step_is_the_same_step(parts):
    rows, found = sequences(), []
    for inputs in (rows, AnswersAlone(rows, parts)):
        model = add_lora(llama(), LoraConfig(), rank=2, seed=0)
        keys = TrainConfig(steps=3, batch_size=6, precision="float32", accumulate=2,
                           gradient_checkpointing=True)  # fmt: skip
        found.append(train(model, inputs, keys, seed=0))
    assert found[1].loss == pytest.approx(found[0].loss, rel=1e-5)
    assert found[1].num_examples == found[0].num_examples == len(rows)
    empty = AnswersAlone(rows).batch([3])  # nothing in it is trained
    assert "logits_to_keep" not in empty


def test_a_task_asks_once_it_has_seen_the_model(folder, tmp_path):  # noqa: F811
    path = written(tmp_path, [{"prompt": "what is", "completion": "six"}] * 12)
    task = make_task(config(folder, path))
    inputs = task.encode(task.train_rows())
    assert "logits_to_keep" not in task.for_training(inputs).batch([0])
    task.model({}, seed=0, shapes_only=True)
    assert "logits_to_keep" in task.for_training(inputs).batch([0])
    assert "logits_to_keep" not in inputs.batch([0])  # evaluation looks at all


def test_clients_that_share_a_batch_ask_for_all_logits(folder, tmp_path):  # noqa: F811
    path = written(tmp_path, [{"prompt": "what is", "completion": "six"}] * 12)
    flat = config(folder, path, **{"simulate.clients-per-process": 2, "train.steps": 2})
    task = make_task(flat)
    model = add_lora(task.model({}, seed=0), flat.lora, rank=2, seed=0)
    inputs = task.for_training(task.encode(task.train_rows()))
    adapter = Adapter.from_state_dict(
        {key: value.clone() for key, value in adapter_state(model).items()}, flat.lora.scale
    )
    jobs = [Job(adapter, inputs.take(rows), flat.train, 1) for rows in (range(5), range(5, 11))]
    found = train_together(task, model, jobs)
    for job, (together, trained) in zip(jobs, found, strict=True):
        load_adapter(model, adapter)
        alone = train(model, job.inputs, flat.train, seed=1)
        assert together.loss == pytest.approx(alone.loss, rel=1e-4)
        for key, value in trained.to_state_dict().items():
            torch.testing.assert_close(value, adapter_state(model)[key], rtol=1e-4, atol=1e-5)


class Deaf(transformers.LlamaForCausalLM):
    """Takes which logits to keep, and shifts all labels by itself."""

    def forward(self, input_ids=None, labels=None, logits_to_keep=0, shift_labels=None):
        return super().forward(input_ids, labels=labels, logits_to_keep=logits_to_keep)


class Capped(transformers.LlamaForCausalLM):
    """Does something to the logits between its last layer and its loss."""

    def forward(self, input_ids=None, labels=None, logits_to_keep=0, shift_labels=None):
        out = super().forward(input_ids, logits_to_keep=logits_to_keep)
        out.logits = torch.tanh(out.logits * 9)
        vocabulary = self.config.vocab_size
        out.loss = self.loss_function(
            out.logits, labels=labels, vocab_size=vocabulary, shift_labels=shift_labels
        )
        return out


@pytest.mark.parametrize("make", [llama, gpt2, sliding])
@pytest.mark.parametrize("most", [1, 200, 10**9])
@pytest.mark.parametrize("kept", [False, True])
def test_loss_and_gradients_in_parts_are_those_of_all_logits(make, most, kept, monkeypatch):
    monkeypatch.setattr(loss_in_parts, "LOGITS", most)
    model = add_lora(make(), LoraConfig(target_modules="all-linear"), rank=2, seed=0).double()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(len(name)))
    rows, found = sequences(), []
    head = model.get_base_model().get_output_embeddings()
    for inputs in (AnswersAlone(rows), AnswersAlone(rows, parts=True)):
        batch = (inputs if kept else rows).batch([1, 2, 3, 5, 8])
        with inputs.around(model):
            out = model(**batch)
        (3 * out.loss).backward()
        found.append((out, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
        model.zero_grad(set_to_none=True)
        assert "forward" not in vars(head)
        assert "_loss_function" not in vars(model.get_base_model())
    (whole, gradients), (part, others) = found
    assert float(part.loss) == pytest.approx(float(whole.loss), rel=1e-6)
    assert part.logits.shape[-1] != whole.logits.shape[-1]
    assert gradients.keys() == others.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, rtol=1e-4, atol=1e-7)


def test_a_last_layer_that_is_trained_has_all_its_logits():
    inputs = AnswersAlone(sequences(), parts=True)
    model = llama()
    with inputs.around(model):
        assert model(**inputs.batch([1, 2])).logits.shape[-1] == model.config.vocab_size


def test_what_was_put_on_a_model_before_is_there_again():
    inputs, model = AnswersAlone(sequences(), parts=True), llama().requires_grad_(False)
    head, calls = model.get_output_embeddings(), []
    own, mean = head.forward, model.loss_function
    head.forward = lambda states: calls.append(len(states)) or own(states)
    model.loss_function = lambda *a, **k: mean(*a, **k)
    before = head.forward, model.loss_function
    with inputs.around(model):
        model(**inputs.batch([1, 2]))
    assert calls  # the loss was computed with it
    assert (head.forward, model.loss_function) == before


def test_a_model_is_asked_for_it_only_where_it_holds():
    with torch.device("meta"):
        for model in (llama(), gpt2()):
            assert takes_few_logits(model)
            assert takes_parts(model)
        capped = Capped(llama().config)
        assert takes_few_logits(capped)
        assert not takes_parts(capped)
        for model in (Deaf(llama().config), transformers.BertModel(transformers.BertConfig())):
            assert not takes_few_logits(model)
            assert not takes_parts(model)
