import shutil
from pathlib import Path

import lightning as L
import pytest
import torch
from torch import nn

from mole.checkpoints import Zoo
from mole.config import Config, GeneratorConfig, load
from mole.diffusion.codec import Codec
from mole.diffusion.conditions import Conditions
from mole.diffusion.denoiser import Denoiser, Networks
from mole.diffusion.module import DenoiserTraining, learning_rate_factor, root_mean_square
from mole.diffusion.pairs import Batch, PairBatches, ZooPairs, choose_states
from mole.diffusion.request import Request
from mole.diffusion.speed import operations
from mole.diffusion.training import Data, _strategy, _trainer, check_trainable, make_codec, train_generator
from mole.errors import MoleError
from mole.representations import WeightSpec, neuron_view
from mole.representations.structure import word
from mole.seeding import stream
from mole.tasks import Architecture, Classification, energy_score

CPU = torch.device("cpu")
CONFIG = load(
    [],
    [
        ("train.steps", "12"), ("train.batch_size", "8"), ("train.checkpoint_every", "4"), ("train.log_every", "3"),
        ("train.validate_every", "6"), ("generator.width", "16"), ("generator.layers", "1"), ("generator.heads", "2"),
        ("train.function_images", "8"), ("train.warmup_steps", "2"), ("train.objective", "mean"),
    ],
)  # fmt: skip


@pytest.fixture
def zoo(toy_zoo: Zoo) -> Zoo:
    return toy_zoo


@pytest.fixture
def source(zoo: Zoo, toy: Classification) -> ZooPairs:
    return ZooPairs(zoo, toy, CONFIG.generator)


def batches(source: ZooPairs, config: Config = CONFIG) -> PairBatches:
    return PairBatches(source, [make_codec(config, source)], config.train, seed=0)


def batch_of(source: ZooPairs, step: int, config: Config = CONFIG) -> Batch:
    (part,) = batches(source, config).batch(step)
    return part


def test_a_batch_depends_on_its_step_alone(source: ZooPairs) -> None:
    late = PairBatches(source, [make_codec(CONFIG, source)], CONFIG.train, seed=0, first_step=9)
    (first,), (again,) = list(batches(source))[9], next(iter(late))
    assert torch.equal(first.noised, again.noised) and torch.equal(first.level, again.level)
    assert len(list(late)) == 3
    assert not torch.equal(batch_of(source, 1).clean, batch_of(source, 2).clean)


def test_pairs_are_of_one_run_and_in_order_of_time(zoo: Zoo, source: ZooPairs) -> None:
    scale = make_codec(CONFIG, source)
    rows, loss = scale.normalise(zoo.read(torch.arange(40))), zoo.loss.reshape(10, 4)
    pure = unstarted = forgotten = 0
    for step in range(12):
        batch = batch_of(source, step)
        for i in range(8):
            if not batch.conditions.started[i]:
                assert bool((batch.start[i] == 0).all()) and bool(batch.conditions.scalars[i, 0].isnan())
                unstarted += 1
                continue
            run_a, first = divmod(int((rows == batch.start[i]).all(1).nonzero()[0]), 4)
            run_b, second = divmod(int((rows == batch.clean[i]).all(1).nonzero()[0]), 4)
            assert run_a == run_b and first <= second
            for found, value in zip(
                batch.conditions.scalars[i], (loss[run_a, first], loss[run_b, second]), strict=True
            ):
                assert found.isnan() or found == value
                forgotten += int(found.isnan())
            pure += int(batch.level[i] == 1)
    assert 40 <= pure <= 76  # about two thirds of those that have a start
    assert 2 <= unstarted <= 20 and 6 <= forgotten <= 32  # about a tenth of 96 and of 173


def test_states_of_short_and_long_runs_are_chosen_within_them() -> None:
    generator, config = torch.Generator().manual_seed(0), CONFIG.train
    counts = torch.tensor([1, 2, 5, 200]).repeat(500)
    first, second = choose_states(counts, config, generator)
    assert bool((first <= second).all()) and bool((first >= 0).all()) and bool((second < counts).all())
    long = counts == 200
    assert 0.6 < float((first[long] == 0).float().mean()) < 0.75  # two thirds from the initialisation
    assert float((second[long] >= 150).float().mean()) > 0.5  # half of them aim at the last quarter


def test_the_divergence_is_zero_for_the_true_network_and_positive_otherwise(
    toy: Classification, zoo: Zoo, source: ZooPairs
) -> None:
    codec = make_codec(CONFIG, source)
    denoiser = Denoiser([neuron_view(zoo.spec)], CONFIG.generator)
    module = DenoiserTraining(denoiser, [codec], [toy], CONFIG.train, seed=0)
    part = batch_of(source, 0)
    same, other = module._compared(part.clean, part.clean, part), module._compared(part.clean * 0.5, part.clean, part)
    assert [float(value) for value in same] == pytest.approx([0, 0], abs=1e-6)
    assert other.divergence.item() > 1e-3 and other.gap.item() > 1e-3


def test_the_learning_rate_warms_up_and_falls() -> None:
    train = CONFIG.train
    factors = [learning_rate_factor(train, step) for step in range(train.steps + 1)]
    assert factors[0] < factors[1] and factors[1:] == sorted(factors[1:], reverse=True)
    assert factors[-1] == pytest.approx(0.02)


def train(
    config: Config, toy: Classification, zoo: Zoo, state: Path, *, stop_at: int = 0
) -> tuple[dict[str, torch.Tensor], list[int]]:
    """Train; `stop_at` interrupts as Ctrl-C does. Returns the weights and the steps logged."""
    logged: list[int] = []

    def progress(done: int, note: str = "") -> None:
        if stop_at and done == stop_at:
            raise KeyboardInterrupt

    training, heldout = zoo.split_by_run(2)
    data = Data(toy, lambda _: ZooPairs(training, toy, config.generator), heldout)
    generator, _, _ = train_generator(
        config, data, state, identity="me", device=CPU, progress=progress,
        log=lambda step, _: logged.append(step),
    )  # fmt: skip
    return generator.denoiser.state_dict(), logged


def test_an_interrupted_training_continues_bit_for_bit(toy: Classification, zoo: Zoo, tmp_path: Path) -> None:
    whole, logged = train(CONFIG, toy, zoo, tmp_path / "a.ckpt")
    assert logged == [3, 6, 6, 9, 12, 12]
    with pytest.raises(KeyboardInterrupt):
        train(CONFIG, toy, zoo, tmp_path / "b.ckpt", stop_at=7)
    resumed, rest = train(CONFIG, toy, zoo, tmp_path / "b.ckpt")
    assert rest == [6, 6, 9, 12, 12]  # from step 4, the last that was saved
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_foreign_and_hostile_training_states_are_not_used(toy: Classification, zoo: Zoo, tmp_path: Path) -> None:
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


def test_a_loss_that_is_no_number_stops_the_training_with_advice(toy: Classification, zoo: Zoo, tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"train": CONFIG.train.model_copy(update={"learning_rate": 1e30})})
    with pytest.raises(MoleError, match=r"the loss is nan at step 3; lower train\.learning_rate \(now 1e\+30\)"):
        train(config, toy, zoo, tmp_path / "d.ckpt")


@pytest.mark.parametrize(
    ("view", "symmetry"),
    [
        ("neurons", "none"), ("neurons", "augment"), ("neurons", "canonical"), ("graph", "equivariant"),
        ("graph", "canonical"), ("chunks", "none"), ("chunks", "augment"), ("chunks", "canonical"),
        ("latent", "canonical"), ("flat", "none"), ("classes", "equivariant"),
    ],
)  # fmt: skip
def test_every_view_trains_saves_loads_and_draws(
    view: str, symmetry: str, toy: Classification, zoo: Zoo, tmp_path: Path
) -> None:
    settings = {"view": view, "symmetry": symmetry, "latent": 16, "latent_steps": 5, "chunk": 8}
    generator = CONFIG.generator.model_copy(update=settings)
    config = CONFIG.model_copy(update={"generator": generator, "task": toy.config})
    data = Data(toy, lambda state: ZooPairs(zoo, toy, generator), zoo)
    made, *_ = train_generator(
        config, data, tmp_path / "state.ckpt", identity="a", device=torch.device("cpu"),
        progress=lambda step, note="": None, log=lambda step, values: None,
    )  # fmt: skip
    made = made.save(tmp_path / "generator")
    again = type(made).load(tmp_path / "generator")
    again.task = toy
    request = Request(zoo.read(zoo.first), {"target_loss": 0.5})
    assert torch.equal(again.draw(request).flat, made.draw(request).flat)


def replace_train(config: Config, **values: float | str) -> Config:
    return config.model_copy(update={"train": config.train.model_copy(update=values)})


def test_augmentation_moves_a_start_and_its_target_together(toy: Classification, zoo: Zoo, source: ZooPairs) -> None:
    settings = {"view": "neurons", "symmetry": "augment"}
    config = CONFIG.model_copy(update={"generator": CONFIG.generator.model_copy(update=settings)})
    codec, source = make_codec(config, source), ZooPairs(zoo, toy, config.generator)
    config = replace_train(config, drop_start_fraction=0.0)
    moved, plain = batch_of(source, 3, config), batch_of(source, 3, replace_train(CONFIG, drop_start_fraction=0.0))
    assert not torch.equal(moved.start, plain.start)
    task = toy.measure(codec.restore(plain.clean), "prompt")["loss"]
    torch.testing.assert_close(toy.measure(codec.restore(moved.clean), "prompt")["loss"], task)
    distance = (moved.start - moved.clean).norm(dim=1)
    torch.testing.assert_close(distance, (plain.start - plain.clean).norm(dim=1))  # one element for both


def test_all_states_of_a_run_follow_its_last_one(toy: Classification, zoo: Zoo) -> None:
    settings = {"view": "neurons", "symmetry": "canonical"}
    config = CONFIG.model_copy(update={"generator": CONFIG.generator.model_copy(update=settings)})
    source = ZooPairs(zoo, toy, config.generator)
    before = zoo.read(torch.arange(len(zoo)))
    codec = make_codec(config, source)
    after = torch.cat(list(source.chunks(0)))
    assert source.elements is not None and codec.canonical is not None
    runs = torch.repeat_interleave(source.parts[0].counts)
    torch.testing.assert_close(after, source.elements[runs].act(before))
    torch.testing.assert_close(toy.measure(after, "prompt")["loss"], zoo.loss, rtol=1e-4, atol=1e-5)
    last = after[zoo.last]
    torch.testing.assert_close(codec.canonical.elements(last).act(last), last, rtol=1e-4, atol=1e-5)  # idempotent
    torch.testing.assert_close(source.elements[runs].undo(after), before, rtol=1e-4, atol=1e-6)


def test_a_batch_that_is_too_large_is_told_with_one_that_fits(
    toy: Classification, zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = DenoiserTraining.training_step

    def tight(self: DenoiserTraining, batch: list[Batch], index: int) -> dict[str, torch.Tensor]:
        if sum(len(part.level) for part in batch) > 3:
            raise torch.OutOfMemoryError("tried to allocate 5 GiB")
        return step(self, batch, index)

    monkeypatch.setattr(DenoiserTraining, "training_step", tight)
    with pytest.raises(MoleError, match=r"batch_size 8 does not fit .*5 GiB\); 2 would: set train.batch_size 2"):
        train(CONFIG, toy, zoo, tmp_path / "a.ckpt")


@pytest.mark.parametrize(("objective", "common"), [("energy", False), ("consistency", False), ("energy", True)])
def test_every_objective_trains_and_resumes_bit_for_bit(
    objective: str, common: bool, toy: Classification, zoo: Zoo, tmp_path: Path
) -> None:
    settings, own = {"objective": objective, "steps": 8}, CONFIG.generator.model_copy(update={"common": common})
    config = CONFIG.model_copy(update={"train": CONFIG.train.model_copy(update=settings), "generator": own})
    whole, _ = train(config, toy, zoo, tmp_path / "a.ckpt")
    with pytest.raises(KeyboardInterrupt):
        train(config, toy, zoo, tmp_path / "b.ckpt", stop_at=6)
    resumed, _ = train(config, toy, zoo, tmp_path / "b.ckpt")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    mean = CONFIG.model_copy(update={"train": config.train.model_copy(update={"objective": "mean"})})
    plain, _ = train(mean, toy, zoo, tmp_path / "c.ckpt")
    assert any(not torch.equal(whole[name], plain[name]) for name in whole)


def test_for_energy_pure_noise_is_drawn_twice_and_the_rest_is_denoised(source: ZooPairs) -> None:
    config = replace_train(CONFIG, objective="energy")
    for step in range(4):
        plain = batch_of(source, step)
        drawn, rest = batches(source, config).batch(step)
        pure = plain.level == 1
        assert rest.again is None and bool((rest.level < 1).all()) and torch.equal(rest.clean, plain.clean[~pure])
        assert drawn.again is not None and torch.equal(drawn.clean, plain.clean[pure])
        assert bool((drawn.level == 1).all())
        assert [*drawn.seeds] == [seed for seed, one in zip(plain.seeds, pure.tolist(), strict=True) if one]
        correlation = torch.corrcoef(torch.stack([drawn.again.flatten(), drawn.noised.flatten()]))[0, 1]
        assert abs(float(correlation)) < 0.3 and float(drawn.again.std()) == pytest.approx(1, abs=0.2)
    (only,) = batches(source, replace_train(config, one_pass_fraction=1.0)).batch(0)
    assert only.again is not None and len(only.level) == 8


def test_the_loss_of_two_draws_by_hand(source: ZooPairs) -> None:
    config = replace_train(CONFIG, objective="energy", function_weight=9.0, gap_weight=2.0)
    codec, task = make_codec(config, source), source.tasks[0]
    denoiser = Denoiser([codec.view], config.generator)
    for parameter in denoiser.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape)
    module = DenoiserTraining(denoiser, [codec], [task], config.train, seed=0)
    batch = PairBatches(source, [codec], config.train, seed=0).batch(0)
    assert [part.again is None for part in batch] == [False, True]
    loss = module.training_step(batch, 0)["loss"]

    def compared(*weights: torch.Tensor) -> torch.Tensor:
        images = stream("function images", 0, 0)
        first, true, *again = (codec.restore(each) for each in weights)
        found = task.compare(first, true, 8, images, [0] * len(first), *again)
        return found.divergence + 2 * found.gap

    drawn, rest = batch
    assert drawn.again is not None
    one, other, mean = (
        denoiser([module.networks(part, noised, part.level)])[0]
        for part, noised in ((drawn, drawn.noised), (drawn, drawn.again), (rest, rest.noised))
    )
    assert not torch.allclose(one, other)

    def far(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return ((a - b) ** 2).mean(1).sqrt().mean()

    energy = (far(one, drawn.clean) + far(other, drawn.clean) - far(one, other)) / 2
    energy = energy + 3 * compared(one, drawn.clean, other)
    plain = ((mean - rest.clean) ** 2).mean() + 9 * compared(mean, rest.clean)
    by_hand = (len(drawn.level) * energy + len(rest.level) * plain) / 8
    torch.testing.assert_close(loss, by_hand, rtol=1e-5, atol=1e-5)


def test_the_energy_score_is_least_for_the_true_distribution() -> None:
    generator = torch.Generator().manual_seed(0)
    true = torch.randn(4000, 6, generator=generator)

    def score(spread: float) -> float:
        one, other = torch.randn(2, 4000, 6, generator=generator) * spread
        return float(energy_score(root_mean_square, one, other, true))

    scores = {spread: score(spread) for spread in (0.0, 0.5, 1.0, 1.5, 2.0)}
    assert min(scores, key=lambda spread: scores[spread]) == 1.0, scores


def test_a_chain_of_consistent_predictions_ends_at_the_clean_weights(source: ZooPairs) -> None:
    config = replace_train(CONFIG, one_pass_fraction=0.0)
    config = config.model_copy(update={"train": config.train.model_copy(update={"objective": "consistency"})})
    for step in (0, 11):
        part = batch_of(source, step, config)
        assert part.earlier is not None
        earlier, level = part.earlier
        ends = level == 0
        assert bool((level <= part.level).all()) and torch.equal(earlier[ends], part.clean[ends])
        gap = (part.level - level)[~ends]
        torch.testing.assert_close(gap, torch.full_like(gap, 2.0 ** -(1 + int(5 * step / 12))), rtol=0, atol=2e-3)


def test_processes_share_batches_that_divide_and_weights_of_one_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(MoleError, match=r"train\.batch_size 8 does not divide among 3 processes"):
        _trainer(replace_train(CONFIG, batch_size=8), torch.device("cpu"), L.Callback(), Path(), layouts=1)
    sharded = CONFIG.model_copy(update={"runtime": CONFIG.runtime.model_copy(update={"strategy": "fsdp"})})
    with pytest.raises(MoleError, match=r"fsdp: the zoo has 2 layouts of networks, .*; legal is ddp"):
        _strategy(sharded, 2, layouts=2)


def test_operations_are_counted_by_hand() -> None:
    layers = GeneratorConfig(width=8, layers=1, heads=1, mlp_ratio=2, conditions=["target_loss"])
    view = neuron_view(WeightSpec.of(nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 1))))
    flat = torch.zeros(5, view.spec.size)
    asked = Conditions.of(layers.conditions, 5, {"target_loss": 1.0})
    found = operations(Denoiser([view], layers), [Networks(view, flat, flat, torch.ones(5), asked)])
    tokens = 3  # two neurons, one output bias
    block = 2 * 5 * tokens * 8 * (3 * 8 + 8 + 2 * 16) + 2 * 5 * 8 * 6 * 8
    ends = 2 * 5 * (2 * (10 * 8 + 8 * 5) + (2 * 8 + 8)) + 2 * 2 * 64 * 8  # read and write; depths of two kinds
    conditions = 2 * 5 * (3 * 64 * 8 + 8 * 8) + 2 * 2 * 8 + 2 * 5 * 8 * 16
    kept = 2 * 5 * (3 * 2 + 1) * 8  # of three parts of two neurons and of the output bias
    assert found == 3 * (block + ends + kept + conditions)


def test_compiled_blocks_train_to_the_same_generator(toy: Classification, zoo: Zoo, tmp_path: Path) -> None:
    if shutil.which("g++") is None:
        pytest.skip("needs a C++ compiler")
    config = CONFIG.model_copy(update={"train": CONFIG.train.model_copy(update={"steps": 3})})
    plain, _ = train(config, toy, zoo, tmp_path / "a.ckpt")
    faster = config.model_copy(update={"runtime": config.runtime.model_copy(update={"compile": True})})
    compiled, _ = train(faster, toy, zoo, tmp_path / "b.ckpt")
    assert compiled.keys() == plain.keys()
    for name, weights in plain.items():
        torch.testing.assert_close(compiled[name], weights, rtol=1e-3, atol=1e-5)


def test_processes_that_train_together_draw_different_pairs(source: ZooPairs, monkeypatch: pytest.MonkeyPatch) -> None:
    codec, parts = make_codec(CONFIG, source), []
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        (part,) = PairBatches(source, [codec], CONFIG.train, seed=0).batch(3)
        assert len(part.level) == 4  # half of the batch each
        parts.append(part)
    assert not torch.equal(parts[0].clean, parts[1].clean) and not torch.equal(parts[0].noised, parts[1].noised)


def test_what_could_not_be_loaded_again_is_refused_before_the_training(toy: Classification, zoo: Zoo) -> None:
    class Own(Architecture):
        def build(self, seed: int) -> nn.Module:
            torch.manual_seed(seed)
            return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))

    class Theirs(Classification):
        @property
        def architecture(self) -> Architecture:
            return Own(**super().architecture.model_dump())

    foreign = Theirs(toy.config, toy.train, toy.prompt, toy.test, classes=3)
    with pytest.raises(MoleError, match="its networks are Own, which a generator's card cannot name; legal is an Arch"):
        check_trainable(ZooPairs(zoo, foreign, CONFIG.generator))
    wide = toy.with_config(toy.config.model_copy(update={"width": 7}))
    with pytest.raises(MoleError, match=r"the zoo's networks are not those of task digits \(0\.weight is \(7, 5\) and"):
        check_trainable(ZooPairs(zoo, wide, CONFIG.generator))
    check_trainable(ZooPairs(zoo, toy, CONFIG.generator))


def test_a_zoo_of_another_metric_is_refused_before_the_training(toy: Classification, zoo: Zoo, tmp_path: Path) -> None:
    columns = {name: zoo.column(name) for name in ("run", "step", "seed", "accuracy")}
    other = Zoo.of(toy.spec, {**columns, "val/loss": zoo.column("loss")}, zoo.read(torch.arange(40)), metric="val/loss")
    data = Data(toy, lambda state: ZooPairs(other, toy, CONFIG.generator), other)
    steps: list[int] = []

    def progress(done: int, note: str = "") -> None:
        steps.append(done)

    with pytest.raises(MoleError, match=r"no column loss \(its metrics: .*\), which generators are conditioned on"):
        train_generator(
            CONFIG, data, tmp_path / "state", identity="x", device=CPU, progress=progress,
            log=lambda step, values: None,
        )  # fmt: skip
    assert not steps


def test_a_running_variance_is_never_negative() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)).eval()
    spec = WeightSpec.of(network, torch.randn(2, 5))
    config = GeneratorConfig(width=16, layers=1, heads=2, view="flat", symmetry="none")
    codec = Codec(spec, config, {word(entry): 0.5 for entry in spec.entries})
    flat = codec.restore(-torch.ones(2, spec.size))
    state = spec.unflatten(flat[0], torch.zeros(spec.table_size, dtype=torch.int64))
    assert state["1.running_var"].tolist() == pytest.approx([0.005] * 6) and state["1.running_mean"].max() < 0
    network.load_state_dict(state)
    assert bool(network(torch.randn(4, 5)).isfinite().all())
