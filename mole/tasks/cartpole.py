"""CartPole: Gaussian policies trained by proximal policy optimisation, every environment of every run at once.

The dynamics are those of Barto, Sutton and Anderson (1983) as in gymnasium's `CartPole-v1`, with a
continuous action: the force is 10 N times the action, clipped to -1..1, whose ends are gymnasium's two
actions. The recipe is that of Peebles et al. 2022 (released code).

Dimensions: N runs, E environments, T steps of a rollout, B = E * T / MINIBATCHES samples, P parameters.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Self

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from mole.config import TaskConfig
from mole.errors import MoleError
from mole.seeding import Seeded, derived, stream
from mole.tasks.batched import batched
from mole.tasks.networks import Architecture, Policy, mlp, orthogonal
from mole.tasks.task import Comparison, Metrics, SplitName, Task, energy_score

GRAVITY, CART_MASS, POLE_MASS, HALF_LENGTH, FORCE, SECONDS = 9.8, 1.0, 0.1, 0.5, 10.0, 0.02
POSITION_LIMIT, ANGLE_LIMIT = 2.4, 12 * 2 * math.pi / 360
SPEED = 2.0
"""Fastest cart (m/s) and pole (rad/s) among the states that policies are compared in."""
JUDGED = 0.1
"""Deviation about the clipped mean actions at which policies are compared, beside their own; the mean is judged."""
HORIZON = 500
"""Steps after which an episode ends; the highest return."""

ENVIRONMENTS, ROLLOUT, EPOCHS, MINIBATCHES = 512, 16, 8, 2
CLIP, GAMMA, LAMBDA = 0.2, 0.99, 0.95
UPDATES = EPOCHS * MINIBATCHES
"""Optimiser steps per iteration, which is one rollout."""

EPISODES = {"train": 64, "prompt": 64, "test": 128}
"""Fixed first states that a split judges by."""


def load(config: TaskConfig) -> "CartPole":
    """The task; there are no data to load."""
    return CartPole(config)


def physics(state: Tensor, action: Tensor) -> Tensor:
    """The state (..., 4) after one step of 0.02 s: position, velocity, angle and angular velocity.

    Args:
        state: (..., 4), in metres, radians and seconds.
        action: (...), the force as a share of 10 N, clipped to -1..1.
    """
    position, velocity, angle, spin = state.unbind(-1)
    force = FORCE * action.clamp(-1, 1)
    sine, cosine = angle.sin(), angle.cos()
    mass = CART_MASS + POLE_MASS
    push = (force + POLE_MASS * HALF_LENGTH * spin.square() * sine) / mass
    spinning = (GRAVITY * sine - cosine * push) / (HALF_LENGTH * (4 / 3 - POLE_MASS * cosine.square() / mass))
    moving = push - POLE_MASS * HALF_LENGTH * spinning * cosine / mass
    return torch.stack(
        [position + SECONDS * velocity, velocity + SECONDS * moving, angle + SECONDS * spin, spin + SECONDS * spinning],
        -1,
    )


def fallen(state: Tensor) -> Tensor:
    """Whether the cart has left its track or the pole has fallen, or is nowhere (NaN): (...) bool."""
    return ~((state[..., 0].abs() <= POSITION_LIMIT) & (state[..., 2].abs() <= ANGLE_LIMIT))


def first_states(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """First states (*shape, 4), each number uniform in -0.05..0.05."""
    return torch.rand(*shape, 4, generator=generator) * 0.1 - 0.05


class Learner(nn.Module):
    """The policy, which is kept, and the critic that it learns with."""

    def __init__(self, policy: Policy, critic: nn.Sequential) -> None:
        super().__init__()
        self.policy, self.critic = policy, critic

    def forward(self, observations: Tensor) -> tuple[Tensor, Tensor]:
        """Mean actions and values, each (B,)."""
        return self.policy(observations)[:, 0], self.critic(observations)[:, 0]


@dataclass(frozen=True)
class CartPole(Task):
    """Policies 4-32-32-1 that balance a pole; `loss` is the share of the highest return that is missing."""

    place: torch.device = field(default_factory=lambda: torch.device("cpu"))
    chosen: Architecture | None = None
    """Policies of another architecture than the configuration's."""
    prefix = "policy."
    score = "return"

    @property
    def architecture(self) -> Architecture:
        if self.chosen is not None:
            return self.chosen
        widths = [4, *[self.config.width] * self.config.depth, 1]
        return Architecture(kind="policy", widths=widths, activation=self.config.activation)

    @property
    def device(self) -> torch.device:
        return self.place

    @property
    def numbers_per_step(self) -> int:
        return ENVIRONMENTS * ROLLOUT * 8

    @property
    def sizes(self) -> dict[str, int]:
        return {f"{name}_episodes": count for name, count in EPISODES.items()}

    def to(self, device: torch.device) -> Self:
        return replace(self, place=device)

    def with_architecture(self, architecture: Architecture) -> Self:
        found = architecture.kind, architecture.widths[0], architecture.widths[-1]
        if found != ("policy", 4, 1):
            raise MoleError(
                f"architecture {found[0]} from {found[1]} to {found[2]} numbers; legal for cartpole is policy from 4 "
                "to 1"
            )
        return replace(self, chosen=architecture)

    def learner(self, seed: int) -> nn.Module:
        policy = self.architecture.build(seed)
        assert isinstance(policy, Policy)
        with Seeded(derived("critic", seed)):
            critic = orthogonal(mlp(self.architecture.widths, self.config.activation), last_gain=1.0)
        return Learner(policy, critic)

    def feed(self, seeds: Sequence[int]) -> "Rollouts":
        return Rollouts(self, seeds)

    def outputs(self, state: dict[str, Tensor], observations: Tensor) -> tuple[Tensor, Tensor]:
        """Mean actions and values of one learner, each (B,)."""
        return functional_call(self.template, state, (observations,))

    def loss(self, state: dict[str, Tensor], *batch: Tensor) -> Tensor:
        """Clipped surrogate loss plus clipped value loss (Schulman et al. 2017) of one learner."""
        observations, actions, old_log_prob, advantages, returns, old_values = batch
        mean, values = self.outputs(state, observations)
        ratio = (log_prob(mean, state["policy.log_std"], actions) - old_log_prob).exp()
        surrogate = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - CLIP, 1 + CLIP))
        clipped = old_values + (values - old_values).clamp(-CLIP, CLIP)
        value = torch.maximum((values - returns).square(), (clipped - returns).square())
        return surrogate.mean() + value.mean()

    def actions(self, flat: Tensor, states: Tensor) -> Tensor:
        """Mean actions (N, B) of policies (N, P) in states (B, 4), or each in its own (N, B, 4)."""
        network, spec = self._judged, self.spec

        def act(weights: Tensor, seen: Tensor) -> Tensor:
            return functional_call(network, spec.unflatten(weights), (seen,))[:, 0]

        return vmap(act, in_dims=(0, 0 if states.ndim == 3 else None))(flat, states)

    @cached_property
    def _judged(self) -> nn.Module:
        return batched(self.network).eval()

    def compare(
        self, predicted: Tensor, true: Tensor, count: int, generator: torch.Generator, seeds: Sequence[int],
        again: Tensor | None = None,
    ) -> Comparison:  # fmt: skip
        box = torch.tensor([POSITION_LIMIT, SPEED, ANGLE_LIMIT, SPEED])
        reach = torch.rand(count, 1, generator=generator)  # many states near rest, where good policies stay
        states = ((2 * torch.rand(count, 4, generator=generator) - 1) * reach * box).to(self.place)

        def said(flat: Tensor) -> tuple[Tensor, Tensor]:
            return self.actions(flat, states), vmap(self.spec.unflatten)(flat)["log_std"]

        with torch.no_grad():
            wanted, wide = said(true)  # (N, B), (N, 1)
        mean, log_std = said(predicted)
        if again is not None:
            score = energy_score(_apart, (mean, log_std), said(again), (wanted, wide))
            return Comparison(score, torch.zeros_like(mean[0, 0]))
        apart = ((2 * wide).exp() + (mean - wanted).square()) / (2 * (2 * log_std).exp())
        judged = (mean.clamp(-1, 1) - wanted.clamp(-1, 1)).square() / (2 * JUDGED**2)
        return Comparison((log_std - wide + apart - 0.5 + judged).mean(), torch.zeros_like(mean[0, 0]))

    @torch.no_grad()
    def measure(
        self, flat: Tensor, split: SplitName, seeds: Sequence[int] | None = None, *, networks_at_once: int = 512
    ) -> Metrics:
        """`return` (0..500) of the mean action from the split's first states, and `loss`, 1 - return / 500."""
        generator = stream(f"first states, {split}")
        first = first_states([EPISODES[split]], generator).to(flat.device)
        returns = []
        for part in flat.split(networks_at_once):
            state = first.expand(len(part), -1, -1)
            up, total = torch.ones_like(state[..., 0]), torch.zeros_like(state[..., 0])
            for _ in range(HORIZON):
                state = physics(state, self.actions(part, state))
                total += up  # the step in which the pole falls counts, as in gymnasium
                up = up * ~fallen(state)
                state = torch.where(up[..., None] > 0, state, 0)
                if not up.any():
                    break
            returns.append(total.mean(1))
        found = torch.cat(returns)
        return {"loss": 1 - found / HORIZON, "return": found}


def _apart(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> Tensor:
    """Distance (N,) between policies: the root of the mean square, of clipped mean actions (N, B) over `JUDGED` and of
    log deviations (N, 1)."""
    acts = ((one[0].clamp(-1, 1) - other[0].clamp(-1, 1)) / JUDGED).square().mean(1)
    return (acts + (one[1] - other[1]).square().mean(1) + 1e-8).sqrt()


def log_prob(mean: Tensor, log_std: Tensor, actions: Tensor) -> Tensor:
    """Log density (B,) of actions under a Gaussian policy with mean (B,) and log deviation (1,)."""
    return -0.5 * ((actions - mean) / log_std.exp()).square() - log_std - 0.5 * math.log(2 * math.pi)


class Rollouts:
    """Environments of every run, and what was seen in them: each iteration is read for `UPDATES` steps."""

    def __init__(self, task: CartPole, seeds: Sequence[int]) -> None:
        self.task = task
        self.generators = [stream("experience", seed) for seed in seeds]
        self.state = self._drawn(lambda g: first_states([ENVIRONMENTS], g), 0)  # (N, E, 4)
        self.age = torch.zeros(self.state.shape[:2], device=task.device)

    def keep(self, runs: Tensor) -> None:
        self.generators = [self.generators[run] for run in runs.tolist()]
        self.state, self.age = self.state[runs], self.age[runs]
        self.seen = [tensor[runs] for tensor in self.seen]

    def _drawn(self, draw: Callable[[torch.Generator], Tensor], axis: int) -> Tensor:
        """One drawing per run; always as many numbers, so that a run does not depend on its neighbours."""
        return torch.stack([draw(generator) for generator in self.generators], axis).to(self.task.device)

    def batch(self, step: int, state: dict[str, Tensor]) -> tuple[Tensor, ...]:
        if step % UPDATES == 0:
            self.seen = [tensor.transpose(1, 2).flatten(1, 2) for tensor in self._collect(state)]  # (N, T * E, ...)
        return tuple(tensor.chunk(MINIBATCHES, 1)[step % MINIBATCHES] for tensor in self.seen)

    @torch.no_grad()
    def _collect(self, learners: dict[str, Tensor]) -> list[Tensor]:
        """One rollout of every run: tensors (N, E, T, ...)."""
        noise = self._drawn(lambda g: torch.randn(ROLLOUT, ENVIRONMENTS, generator=g), 1)  # (T, N, E)
        fresh = self._drawn(lambda g: first_states([ROLLOUT, ENVIRONMENTS], g), 1)  # (T, N, E, 4)
        outputs = vmap(self.task.outputs)
        log_std = learners["policy.log_std"]  # (N, 1)
        observations, actions, log_probs, values, ends = [], [], [], [], []
        for step in range(ROLLOUT):
            mean, value = outputs(learners, self.state)
            action = mean + log_std.exp() * noise[step]
            observations.append(self.state)
            actions.append(action)
            log_probs.append(log_prob(mean, log_std, action))
            values.append(value)
            self.state, self.age = physics(self.state, action), self.age + 1
            over = fallen(self.state) | (self.age >= HORIZON)
            ends.append(over)
            self.state = torch.where(over[..., None], fresh[step], self.state)
            self.age = torch.where(over, 0, self.age)
        last = outputs(learners, self.state)[1]
        advantages = estimate_advantages(torch.stack(values, 2), torch.stack(ends, 2), last)
        returns = advantages + torch.stack(values, 2)
        spread = advantages.std((1, 2), keepdim=True)
        scaled = (advantages - advantages.mean((1, 2), keepdim=True)) / (spread + 1e-8)
        kept = (torch.stack(part, 2) for part in (observations, actions, log_probs))
        return [*kept, scaled, returns, torch.stack(values, 2)]


def estimate_advantages(values: Tensor, ends: Tensor, last: Tensor) -> Tensor:
    """Generalised advantage estimation (Schulman et al. 2016) for a reward of 1 per step.

    Args:
        values: (..., T), of the states that were seen.
        ends: (..., T) bool, whether the episode ended with the step.
        last: (...), values of the states after the last step.
    """
    advantage, found = torch.zeros_like(last), []
    for step in reversed(range(values.shape[-1])):
        following = last if step == values.shape[-1] - 1 else values[..., step + 1]
        goes_on = ~ends[..., step]
        delta = 1 + GAMMA * following * goes_on - values[..., step]
        advantage = delta + GAMMA * LAMBDA * advantage * goes_on
        found.append(advantage)
    return torch.stack(found[::-1], -1)
