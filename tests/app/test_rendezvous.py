"""Processes that leave their orders in a folder, and one of them that does all."""

import copy
import multiprocessing
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch

from fedlora_app.config.keys import ConfigError
from fedlora_app.config.read import read_config
from fedlora_app.rendezvous import Order, Rendezvous, of_this_run
from fedlora_app.together import train_with_others
from fedlora_app.training import train
from strategies.client import adapter_state, load_adapter
from strategies.messages import CLIENT_KEY, ROUND_KEY
from tests.app.test_together import TrainConfig, bert, jobs
from tests.app.texts import TASK

FORKED = multiprocessing.get_context("fork")


def doubled(orders):
    about = {"together": len(orders), "by": os.getpid()}
    return [Order({"x": 2 * order.arrays["x"]}, about) for order in orders]


def met(folder, most, numbers, work=doubled):
    def one(number):
        found = Rendezvous(folder, most).done(Order({"x": np.array([number])}, {}), work)
        return found and (int(found.arrays["x"][0]), found.about["together"])

    with ThreadPoolExecutor(len(numbers)) as threads:
        return list(threads.map(one, numbers))


def test_each_gets_what_became_of_its_own_order(tmp_path):
    found = met(tmp_path, 3, range(7))
    assert [x for x, _ in found] == [0, 2, 4, 6, 8, 10, 12]
    assert max(n for _, n in found) == 3  # never more
    assert [file.name for file in tmp_path.iterdir()] == ["leader"]  # nothing is left


def test_who_comes_alone_waits_for_a_moment_only(tmp_path):
    began = time.perf_counter()
    assert met(tmp_path, 8, [4]) == [(8, 1)]
    assert time.perf_counter() - began < 5


def test_what_cannot_be_done_together_is_left_to_each(tmp_path):
    def never(orders):
        raise ValueError("only linear layers")

    assert met(tmp_path, 2, [1, 2], never) == [None, None]


def _killed(folder):
    def dies(orders):
        os.kill(os.getpid(), signal.SIGKILL)

    Rendezvous(folder, 2).done(Order({"x": np.array([1])}, {}), dies)


def test_another_leads_where_a_leader_is_killed(tmp_path):
    process = FORKED.Process(target=_killed, args=(tmp_path,))
    process.start()
    while not any(tmp_path.glob("*.order")):
        time.sleep(0.01)
    assert met(tmp_path, 2, [5])[0][0] == 10
    process.join()


def test_outside_a_simulation_nobody_meets():
    assert of_this_run(8) is None
    assert of_this_run(1) is None


def test_clients_that_meet_train_as_each_would_alone(tmp_path):
    base = bert()
    made = [replace(job, message={ROUND_KEY: 2, CLIENT_KEY: i, "model-round": 1})
            for i, job in enumerate(jobs(base, TrainConfig(steps=2, batch_size=4)))]  # fmt: skip
    made = [replace(job, seed=7) for job in made]
    models = [copy.deepcopy(base) for _ in made]
    for model, job in zip(models, made, strict=True):
        load_adapter(model, job.adapter)
    alone = [copy.deepcopy(model) for model in models]
    wanted = [
        train(model, job.inputs, job.config, job.message, seed=7)
        for model, job in zip(alone, made, strict=True)
    ]

    def one(number):
        def elsewhere(place, message):
            assert message == made[place].message
            return made[place].inputs, made[place].config

        meeting = Rendezvous(tmp_path, len(made))
        return train_with_others(meeting, TASK, models[number], made[number], number, elsewhere)

    with ThreadPoolExecutor(len(made)) as threads:
        found = list(threads.map(one, range(len(made))))
    for ours, other in zip(found, wanted, strict=True):
        assert ours.loss == pytest.approx(other.loss, rel=1e-4)
        assert (ours.steps, ours.num_examples) == (other.steps, other.num_examples)
    for model, other in zip(models, alone, strict=True):
        torch.testing.assert_close(adapter_state(model), adapter_state(other), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "change",
    [
        {"train.accumulate": 2},
        {"train.gradient-checkpointing": True},
        {"train.proximal-mu": 0.1},
        {"task": "preference", "model.name": "packaged:smollm2-135m"},
        {"lora.variant": "rslora"},
    ],
)
def test_what_cannot_share_a_batch_is_refused_at_the_door(change):
    with pytest.raises(ConfigError, match=r"simulate\.clients-per-process: .* leave one"):
        read_config({"simulate.clients-per-process": 4, **change})
