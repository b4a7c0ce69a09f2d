from pathlib import Path

import pytest
import torch

from mole.checkpoints import Zoo, train_population
from mole.config import Config, load
from mole.diffusion.module import DenoiserTraining, learning_rate_factor
from mole.diffusion.pairs import PairBatches
from mole.diffusion.training import Data, train_generator
from mole.errors import MoleError
from mole.representations import EntryScale
from mole.tasks import Task

CPU = torch.device("cpu")
CONFIG = load(
    [],
    [
        ("train.steps", "12"), ("train.batch_size", "8"), ("train.checkpoint_every", "4"), ("train.log_every", "3"),
        ("train.validate_every", "6"), ("generator.width", "16"), ("generator.layers", "1"), ("generator.heads", "2"),
        ("train.function_images", "8"), ("train.warmup_steps", "2"),
    ],
)  # fmt: skip


@pytest.fixture(scope="module")
def zoo(toy: Task) -> Zoo:
    weights = train_population(toy, range(10), [0, 4, 8, 12])
    found = toy.measure(weights.flatten(0, 1), toy.prompt)
    loss, accuracy = found.loss.reshape(10, 4), found.accuracy.reshape(10, 4)
    return Zoo(toy.spec, [0, 4, 8, 12], torch.arange(10), weights, loss, accuracy, digest="z", skipped=0)


def batches(zoo: Zoo, config: Config = CONFIG) -> PairBatches:
    return PairBatches(zoo, EntryScale.fit(zoo.spec, zoo.weights), config.train, seed=0)


def test_a_batch_depends_on_its_step_alone(zoo: Zoo) -> None:
    late = PairBatches(zoo, EntryScale.fit(zoo.spec, zoo.weights), CONFIG.train, seed=0, first_step=9)
    first, again = list(batches(zoo))[9], next(iter(late))
    assert torch.equal(first.noised, again.noised) and torch.equal(first.level, again.level)
    assert len(list(late)) == 3
    assert not torch.equal(batches(zoo).batch(1).clean, batches(zoo).batch(2).clean)


def test_pairs_are_of_one_run_and_in_order_of_time(zoo: Zoo) -> None:
    scale = EntryScale.fit(zoo.spec, zoo.weights)
    rows = scale.normalise(zoo.weights).flatten(0, 1)
    pure = 0
    for step in range(12):
        batch = batches(zoo).batch(step)
        for i in range(8):
            run_a, first = divmod(int((rows == batch.start[i]).all(1).nonzero()[0]), 4)
            run_b, second = divmod(int((rows == batch.clean[i]).all(1).nonzero()[0]), 4)
            assert run_a == run_b and first <= second
            assert batch.conditions.start_loss[i] == zoo.loss[run_a, first]
            assert batch.conditions.target_loss[i] == zoo.loss[run_b, second]
            pure += int(batch.level[i] == 1)
    assert 48 <= pure <= 80  # about two thirds of 96


def test_the_divergence_is_zero_for_the_true_network_and_positive_otherwise(toy: Task, zoo: Zoo) -> None:
    from mole.diffusion.denoiser import Denoiser
    from mole.representations import NeuronView

    scale = EntryScale.fit(zoo.spec, zoo.weights)
    module = DenoiserTraining(Denoiser(NeuronView(zoo.spec), CONFIG.generator), scale, toy, CONFIG.train, seed=0)
    clean = batches(zoo).batch(0).clean
    assert module._divergence(clean, clean).item() == pytest.approx(0, abs=1e-6)
    assert module._divergence(clean * 0.5, clean).item() > 1e-3


def test_the_learning_rate_warms_up_and_falls() -> None:
    train = CONFIG.train
    factors = [learning_rate_factor(train, step) for step in range(train.steps + 1)]
    assert factors[0] < factors[1] and factors[1:] == sorted(factors[1:], reverse=True)
    assert factors[-1] == pytest.approx(0.02)


def train(
    config: Config, toy: Task, zoo: Zoo, state: Path, *, stop_at: int = 0
) -> tuple[dict[str, torch.Tensor], list[int]]:
    """Train; `stop_at` interrupts as Ctrl-C does. Returns the weights and the steps logged."""
    logged: list[int] = []

    def progress(step: int) -> None:
        if stop_at and step == stop_at:
            raise KeyboardInterrupt

    generator, _, _ = train_generator(
        config, Data(toy, zoo.runs(slice(0, 8)), zoo.runs(slice(8, 10))), state, identity="me", device=CPU,
        progress=progress, log=lambda step, _: logged.append(step),
    )  # fmt: skip
    return generator.denoiser.state_dict(), logged


def test_an_interrupted_training_continues_bit_for_bit(toy: Task, zoo: Zoo, tmp_path: Path) -> None:
    whole, logged = train(CONFIG, toy, zoo, tmp_path / "a.ckpt")
    assert logged == [3, 6, 6, 9, 12, 12]
    with pytest.raises(KeyboardInterrupt):
        train(CONFIG, toy, zoo, tmp_path / "b.ckpt", stop_at=7)
    resumed, rest = train(CONFIG, toy, zoo, tmp_path / "b.ckpt")
    assert rest == [6, 6, 9, 12, 12]  # from step 4, the last that was saved
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_foreign_and_hostile_training_states_are_not_used(toy: Task, zoo: Zoo, tmp_path: Path) -> None:
    state = tmp_path / "c.ckpt"
    whole, _ = train(CONFIG, toy, zoo, tmp_path / "a.ckpt")
    torch.save({"identity": Trap()}, state)
    after_pickle, logged = train(CONFIG, toy, zoo, state)
    assert logged[0] == 3 and all(torch.equal(whole[name], after_pickle[name]) for name in whole)
    state.write_bytes(b"cut off")
    assert train(CONFIG, toy, zoo, state)[1][0] == 3
    torch.save({"identity": "another", "global_step": 9, "seconds": 0.0}, state)
    assert train(CONFIG, toy, zoo, state)[1][0] == 3


class Trap:
    def __reduce__(self) -> tuple[object, ...]:
        return (pytest.fail, ("code in a file was run",))


def test_a_loss_that_is_no_number_stops_the_training_with_advice(toy: Task, zoo: Zoo, tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"train": CONFIG.train.model_copy(update={"learning_rate": 1e30})})
    with pytest.raises(MoleError, match=r"the loss is nan at step 3; lower train\.learning_rate \(now 1e\+30\)"):
        train(config, toy, zoo, tmp_path / "d.ckpt")
