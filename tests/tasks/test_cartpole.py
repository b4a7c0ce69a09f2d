import math

import gymnasium
import numpy as np
import pytest
import torch
from torch.distributions import Normal

from mole.checkpoints import train_population
from mole.config import TaskConfig
from mole.errors import MoleError
from mole.tasks import Architecture, load_task
from mole.tasks.cartpole import (
    HORIZON,
    CartPole,
    Rollouts,
    estimate_advantages,
    fallen,
    first_states,
    log_prob,
    physics,
)

from .conformance import check_task


@pytest.fixture(scope="module")
def task() -> CartPole:
    found = load_task(TaskConfig(name="cartpole", steps=32))
    assert isinstance(found, CartPole)
    return found


def test_the_task_conforms_and_has_the_policy_of_gpt(task: CartPole) -> None:
    assert task.spec.size == 1250 and task.architecture.widths == [4, 32, 32, 1]
    check_task(task, steps=17)  # one rollout and the first step of the next


def test_the_environment_equals_that_of_gymnasium_step_by_step() -> None:
    environment = gymnasium.make("CartPole-v1").unwrapped
    rng = np.random.default_rng(0)
    lengths = []
    for episode in range(20):
        observation, _ = environment.reset(seed=episode)
        state = torch.tensor(np.array(environment.state), dtype=torch.float64)  # type: ignore[attr-defined]
        np.testing.assert_allclose(observation, state.numpy(), rtol=1e-6)
        ended, length = False, 0
        while not ended:
            length += 1
            action = int(rng.integers(2))
            observation, reward, ended, _, _ = environment.step(action)
            state = physics(state, torch.tensor(2.0 * action - 1, dtype=torch.float64))
            np.testing.assert_allclose(np.array(environment.state), state.numpy(), rtol=1e-12, atol=1e-14)  # type: ignore[attr-defined]
            assert reward == 1 and ended == bool(fallen(state))
        lengths.append(length)
    assert max(lengths) > 20


def test_the_return_counts_every_step_up_to_the_fall(task: CartPole) -> None:
    """A network that always pushes right, against gymnasium from the same first states."""
    flat = torch.zeros(1, task.spec.size)
    entry = next(e for e in task.spec.entries if e.name == "actor.4.bias")
    flat[0, entry.offset] = 5.0  # clipped to 1
    found = task.measure(flat, "prompt")
    environment, expected = gymnasium.make("CartPole-v1").unwrapped, []
    from mole.seeding import stream
    from mole.tasks.cartpole import EPISODES

    for state in first_states([EPISODES["prompt"]], stream("first states, prompt")):
        environment.reset(seed=0)
        environment.state = state.double().numpy()  # type: ignore[attr-defined]
        total, ended = 0.0, False
        while not ended:
            _, reward, ended, _, _ = environment.step(1)
            total += float(reward)
        expected.append(total)
    assert found["return"].item() == pytest.approx(np.mean(expected), abs=1e-4)
    assert found["loss"].item() == pytest.approx(1 - np.mean(expected) / 500, abs=1e-6)


def test_a_policy_that_balances_reaches_the_highest_return(task: CartPole) -> None:
    network = task.architecture.build(0)
    state = {name: torch.zeros_like(t) for name, t in network.state_dict().items()}
    gains = torch.tensor([0.1, 0.5, 8.0, 2.0])  # pushes the cart under the pole
    state["actor.0.weight"][0], state["actor.0.bias"][0] = gains * 0.01, 1.0
    state["actor.2.weight"][0, 0], state["actor.2.bias"][0] = 1.0, 0.0
    state["actor.4.weight"][0, 0] = 100 / 1.0507**2
    state["actor.4.bias"][0] = -100.0
    found = task.measure(task.spec.flatten(state)[None], "test")
    assert found["return"].item() == HORIZON and found["loss"].item() == 0


def test_the_density_is_that_of_pytorch() -> None:
    mean, actions, log_std = torch.randn(7), torch.randn(7), torch.tensor([-0.3])
    torch.testing.assert_close(log_prob(mean, log_std, actions), Normal(mean, log_std.exp()).log_prob(actions))


def test_advantages_by_hand() -> None:
    values, ends = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[False, True, False]])
    found = estimate_advantages(values, ends, torch.tensor([4.0]))
    last = 1 + 0.99 * 4 - 3
    middle = 1 - 2.0  # nothing follows the end of an episode
    first = 1 + 0.99 * 2 - 1 + 0.99 * 0.95 * middle
    torch.testing.assert_close(found, torch.tensor([[first, middle, last]]))


def test_rollouts_hold_real_transitions_and_start_again_after_a_fall(task: CartPole) -> None:
    learner = {name: t[None] for name, t in task.learner(0).state_dict().items()}
    feed = Rollouts(task, [0])
    for iteration in range(8):
        batches = [feed.batch(16 * iteration + step, learner) for step in range(16)]
    observations, actions, _, advantages, returns, values = batches[0]
    assert observations.shape == (1, 4096, 4) and actions.shape == (1, 4096)
    assert torch.equal(batches[0][0], batches[2][0]) and not torch.equal(batches[0][0], batches[1][0])
    assert not fallen(observations).any() and bool(feed.age.max() < HORIZON)
    both = torch.cat([batches[0][3], batches[1][3]], 1)
    assert abs(float(both.mean())) < 1e-4 and float(both.std()) == pytest.approx(1, abs=1e-3)
    assert bool((returns - values).abs().max() > 0) and advantages.isfinite().all()
    assert 0 < float(feed.age.float().mean()) < 128 and math.isfinite(float(actions.sum()))


def test_policies_learn_to_balance() -> None:
    task = load_task(TaskConfig(name="cartpole", steps=1280))
    weights = train_population(task, [0, 1], [0, 1280]).weights
    found = task.measure(weights, "prompt")["return"].reshape(2, 2)
    assert (found[:, 1] > found[:, 0] + 20).all()


def test_divergence_is_that_of_two_gaussians(task: CartPole) -> None:
    """Policies that act alike in every state: mean 0.5, deviation 1 against mean 0, deviation 2; and both at 0.1."""
    flat = torch.zeros(2, task.spec.size)
    states = {name: tensor.clone() for name, tensor in task.spec.unflatten(flat[0]).items()}
    last = [name for name in states if name.endswith("bias")][-1]
    true = task.spec.flatten(states | {last: torch.tensor([0.5])})[None]
    predicted = task.spec.flatten(states | {"log_std": torch.tensor([math.log(2)])})[None]
    found = task.compare(predicted, true, 8, torch.Generator().manual_seed(0), [0]).divergence
    assert float(found) == pytest.approx(math.log(2) + (1 + 0.25) / 8 - 0.5 + 0.25 / 0.02, abs=1e-5)


def test_policies_of_other_widths_are_policies_and_classifiers_are_not(task: CartPole) -> None:
    wider = task.with_architecture(Architecture(kind="policy", widths=[4, 8, 1], activation="selu"))
    assert wider.measure(wider.initial([0]), "prompt")["return"].shape == (1,)
    with pytest.raises(MoleError, match="mlp from 4 to 1 numbers; legal for cartpole is policy from 4 to 1"):
        task.with_architecture(Architecture(kind="mlp", widths=[4, 8, 1]))


def test_a_policy_that_computes_nan_falls_at_once(task: CartPole) -> None:
    wild = torch.randn(3, task.spec.size, generator=torch.Generator().manual_seed(0)) * 1e18
    assert wild.isfinite().all()
    assert (task.measure(wild, "test")["return"] < 20).all()


def test_the_critic_of_a_run_is_not_the_policy_of_the_next(task: CartPole) -> None:
    critic, policy = (
        task.learner(0).state_dict()["critic.0.weight"],
        task.learner(1).state_dict()["policy.actor.0.weight"],
    )
    assert critic.shape == policy.shape and not torch.equal(critic, policy)
