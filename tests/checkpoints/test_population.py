from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from mole.checkpoints.population import data_order, kept_steps, train_population
from mole.tasks import Task
from mole.tasks.task import build_network


def test_kept_steps_hold_first_and_last_and_differ() -> None:
    assert kept_steps(10, 11) == list(range(11))
    assert kept_steps(300, 2) == [0, 300]
    for steps, count in [(300, 30), (20, 8), (1000, 200), (1, 2)]:
        kept = kept_steps(steps, count)
        assert len(kept) == count and kept[0] == 0 and kept[-1] == steps
        assert all(a < b for a, b in pairwise(kept))
    with pytest.raises(ValueError, match="cannot keep 5 of 3 states"):
        kept_steps(2, 5)


def test_every_epoch_visits_each_image_at_most_once() -> None:
    order = data_order(7, images=10, batch_size=3, epochs=2)
    assert order.shape == (6, 3)
    for epoch in order.split(3):
        assert len(set(epoch.flatten().tolist())) == 9
    assert torch.equal(order, data_order(7, 10, 3, 2))
    assert not torch.equal(order, data_order(8, 10, 3, 2))


def one_by_one(task: Task, seed: int, steps: int) -> torch.Tensor:
    """The same training as a plain loop over a plain module."""
    network, config = build_network(task.layers, seed), task.config
    if config.optimizer == "adam":
        optimizer: torch.optim.Optimizer = torch.optim.Adam(network.parameters(), lr=config.learning_rate)
    else:
        optimizer = torch.optim.SGD(network.parameters(), lr=config.learning_rate, momentum=0.9, nesterov=True)
    for index in data_order(seed, len(task.train), config.batch_size, 10)[:steps]:
        optimizer.zero_grad()
        F.cross_entropy(network(task.train.images[index]), task.train.labels[index]).backward()
        optimizer.step()
    return task.spec.flatten(network.state_dict()).detach()


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_a_population_equals_the_loop_over_its_members(toy: Task, optimizer: str) -> None:
    config = toy.config.model_copy(update={"optimizer": optimizer})
    task = Task(config, toy.train, toy.prompt, toy.test, toy.classes)
    found = train_population(task, [4, 9], [0, 5, 12])
    assert found.shape == (2, 3, task.spec.size)
    for row, seed in enumerate([4, 9]):
        for column, steps in enumerate([0, 5, 12]):
            torch.testing.assert_close(found[row, column], one_by_one(task, seed, steps), rtol=1e-4, atol=1e-6)


def test_a_run_does_not_depend_on_its_neighbours(toy: Task) -> None:
    together, alone = train_population(toy, [1, 2, 3], [12]), train_population(toy, [2], [12])
    torch.testing.assert_close(together[1], alone[0], rtol=1e-5, atol=1e-7)


def test_given_starts_are_used_and_progress_counts_network_steps(toy: Task) -> None:
    start, told = torch.zeros(2, toy.spec.size), []
    kept = train_population(toy, [0, 1], [0, 3], initial=start, progress=told.append)
    assert torch.equal(kept[:, 0], start) and told == [2, 4, 6]
