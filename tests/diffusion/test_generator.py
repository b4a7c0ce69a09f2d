from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import mole
from mole.config import GeneratorConfig
from mole.diffusion import Generator
from mole.diffusion.card import FORMAT, Card
from mole.diffusion.codec import Codec
from mole.diffusion.denoiser import Denoiser
from mole.errors import CorruptFileError, MoleError, PromptWarning
from mole.files import value_digest, write_json
from mole.reading.text import read_json
from mole.representations import neuron_view
from mole.representations.structure import word
from mole.tasks import Architecture, Classification


@pytest.fixture
def generator(digits: Classification) -> Generator:
    return made(digits)


def made(digits: Classification, *, common: bool = False) -> Generator:
    """With random weights, small ones."""
    config = GeneratorConfig(width=16, layers=1, heads=2, common=common)
    denoiser = Denoiser([neuron_view(digits.spec)], config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    card = Card(
        format=FORMAT, denoiser=config, task=digits.config, architectures=[digits.architecture],
        scales={word(entry): 0.1 for entry in digits.spec.entries}, ranges={"loss": (0.1, 2.4)}, zoo="zoo-digest",
        examples=64, train_steps=1, seed=0,
    )  # fmt: skip
    codec = Codec(digits.spec, config, card.scales)
    return Generator(denoiser.eval(), codec, card, torch.device("cpu"), digits)


def test_samples_are_plain_networks_with_their_origin(generator: Generator, tmp_path: Path) -> None:
    samples = generator.sample(target_loss=0.15, n=3, seed=0)
    assert len(samples) == 3 and len(samples[1:]) == 2 and samples.network_evaluations == 1
    network = samples[0].module()
    assert isinstance(network, nn.Sequential)
    samples[0].save(tmp_path / "network.safetensors")
    plain = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))
    plain.load_state_dict(load_file(tmp_path / "network.safetensors"))
    images = torch.rand(5, 64)
    assert torch.equal(plain(images), network(images))
    record = samples[2].provenance
    assert record["generator"] == generator.digest and record["zoo"] == "zoo-digest"
    assert record["prompt"] == {"target_loss": 0.15} and record["index"] == 2 and record["seed"] == 0
    assert record["start"]["kind"] == "fresh initialisation" and "torch" in record["versions"]


def test_a_network_depends_on_seed_and_index_only(generator: Generator) -> None:
    few, many = generator.sample(n=2, seed=3), generator.sample(n=5, seed=3)
    torch.testing.assert_close(few.flat, many.flat[:2])
    assert torch.equal(generator.sample(n=2, seed=3).flat, few.flat)
    assert not torch.allclose(generator.sample(n=2, seed=4).flat, few.flat)


def test_starts_can_be_given(generator: Generator, digits: Classification) -> None:
    starts = digits.initial([5, 6])
    samples = generator.sample(n=2, starts=starts)
    assert samples[0].provenance["start"]["kind"] == "given weights"
    assert torch.equal(generator.sample(n=2, starts=starts.double().requires_grad_()).flat, samples.flat)
    for wrong in (starts[:1], starts[:, :-1], starts * float("nan"), torch.tensor(1.0)):
        with pytest.raises(MoleError, match=r"legal is (a tensor \(2, 1210\) of real numbers|finite ones)"):
            generator.sample(n=2, starts=wrong)


@pytest.mark.parametrize(
    "arguments",
    [
        {"target_loss": -1.0},
        {"target_loss": float("nan")},
        {"target_loss": "low"},
        {"target_loss": 1e300},
        {"n": 0},
        {"n": 2.5},
        {"n": True},
        {"evaluations": 0},
        {"evaluations": 2000},
        {"seed": -1},
        {"seed": 10**30},
    ],
)
def test_bad_arguments_are_refused(generator: Generator, arguments: dict[str, float]) -> None:
    name = next(iter(arguments))
    with pytest.raises(MoleError, match=rf"{name} is .*; legal is a (whole )?number"):
        generator.sample(**arguments)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("target", [0.05, 3.0])
def test_a_prompt_outside_the_zoo_warns_and_states_the_range(generator: Generator, target: float) -> None:
    with pytest.warns(PromptWarning, match=r"target_loss .* lies outside the zoo, 0\.1 to 2\.4"):
        generator.sample(target_loss=target)


@pytest.mark.parametrize("common", [False, True])
def test_saved_and_loaded_it_draws_the_same(common: bool, digits: Classification, tmp_path: Path) -> None:
    generator = made(digits, common=common)
    saved = generator.save(tmp_path / "generator")
    for path in (tmp_path, tmp_path / "generator"):
        loaded = Generator.load(path)
        assert loaded.digest == saved.digest
        assert torch.equal(loaded.sample(n=2).flat, saved.sample(n=2).flat)


def test_damaged_and_missing_files_are_named(generator: Generator, tmp_path: Path) -> None:
    with pytest.raises(MoleError, match="no generator here"):
        Generator.load(tmp_path)
    saved = generator.save(tmp_path)
    assert saved.sample(n=1)[0].provenance["generator"] == saved.digest != ""
    with pytest.raises(MoleError, match="no generator here"):
        Generator.load(tmp_path / "model.safetensors")
    with pytest.raises(MoleError, match="device 'nowhere'"):
        Generator.load(tmp_path, "nowhere")
    config = read_json(tmp_path / "config.json")
    weights = (tmp_path / "model.safetensors").read_bytes()

    (tmp_path / "model.safetensors").write_bytes(weights[:-4])
    with pytest.raises(CorruptFileError, match=r"model\.safetensors: truncated or altered"):
        Generator.load(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(weights)
    for change, message in (
        ({"format": 99}, f"format 99; this version reads {FORMAT}: update MOLE"),
        ({"surprise": 1}, "surprise"),
        ({"scales": "x"}, "scales"),
        ({"denoiser": {**config["denoiser"], "width": 32}}, "altered after it was written"),
        ({"scales": dict.fromkeys(config["scales"], 9.0)}, "altered after it was written"),
        ({"zoo": "another"}, "altered after it was written"),
    ):
        write_json(tmp_path / "config.json", {**config, **change})
        with pytest.raises(CorruptFileError, match=message):
            Generator.load(tmp_path)


def test_a_generator_travels_as_a_hugging_face_folder(generator: Generator, tmp_path: Path) -> None:
    generator.save(tmp_path / "saved").save_pretrained(tmp_path / "hub")
    with pytest.raises(MoleError, match=r"nowhere: no folder here; legal is a folder .* or owner/name of a repository"):
        Generator.from_pretrained(tmp_path / "nowhere")
    assert {path.name for path in (tmp_path / "hub").iterdir()} == {"config.json", "model.safetensors", "README.md"}
    page = (tmp_path / "hub" / "README.md").read_text()
    assert "library_name: mole" in page and "64-16-10" in page and "loss 0.1 to 2.4" in page
    again = mole.Generator.from_pretrained(tmp_path / "hub")
    assert torch.equal(again.sample(n=2).flat, generator.sample(n=2).flat)
    with pytest.raises(CorruptFileError, match="truncated or altered"):
        (tmp_path / "hub" / "model.safetensors").write_bytes(b"x")
        mole.Generator.from_pretrained(str(tmp_path / "hub"))


def test_conditions_are_named_and_each_can_be_left_out(generator: Generator) -> None:
    with pytest.raises(
        MoleError, match="target_speed is no condition of this generator; it knows start_loss, target_loss"
    ):
        generator.sample(target_speed=3.0)
    with pytest.raises(MoleError, match=r"n is 0; .*; guidance is -1; .*; target_accuracy is no condition"):
        generator.sample(n=0, guidance=-1, target_accuracy=0.9)
    told, free = generator.sample(target_loss=0.3), generator.sample(start_loss=2.3)
    assert not torch.equal(told.flat, free.flat) and free.provenance[0]["prompt"] == {"start_loss": 2.3}
    nothing = generator.sample(n=2, starts="none", target_loss=0.3)
    assert nothing.provenance[0]["start"] == {"kind": "none"} and nothing.network_evaluations == 1
    assert not torch.equal(nothing.flat[0], nothing.flat[1])
    with pytest.raises(MoleError, match="starts is 'fersh'; legal is 'fresh', 'none'"):
        generator.sample(starts="fersh")
    for starts in ([3], [{"0.weight": 3}]):
        with pytest.raises(MoleError, match=r"starts\[0\] is \w+; legal is a network or its state dict"):
            generator.sample(starts=starts)  # pyright: ignore[reportArgumentType]
    assert len(generator.sample(target_loss=np.float32(0.3))) == 1  # pyright: ignore[reportArgumentType]


def test_guidance_overdoes_the_prompt_and_costs_a_second_evaluation(generator: Generator) -> None:
    plain, free, much = (generator.sample(target_loss=0.3, guidance=g) for g in (1, 0, 3))
    assert (plain.network_evaluations, much.network_evaluations) == (1, 2)
    torch.testing.assert_close(much.flat - free.flat, 3 * (plain.flat - free.flat), rtol=1e-3, atol=1e-5)
    assert much.provenance[0]["prompt"] == {"target_loss": 0.3, "guidance": 3.0}


def test_starts_may_be_networks_and_a_foreign_one_is_named_with_both_shapes(
    generator: Generator, digits: Classification
) -> None:
    networks = [digits.architecture.build(seed) for seed in (5, 6)]
    flat = generator.sample(n=2, starts=digits.initial([5, 6])).flat
    assert torch.equal(generator.sample(n=2, starts=networks).flat, flat)
    assert torch.equal(generator.sample(n=2, starts=[network.state_dict() for network in networks]).flat, flat)
    foreign = nn.Sequential(nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 10))
    with pytest.raises(MoleError, match=r"starts\[1\]: .*0\.weight.*\(12, 64\).*\(16, 64\)"):
        generator.sample(n=2, starts=[networks[0], foreign])


def test_other_architectures_are_generated_or_refused(generator: Generator, digits: Classification) -> None:
    with pytest.warns(
        PromptWarning, match=r"seen networks of widths \[64, 16, 10\] alone; what it makes of \[64, 40, 10\]"
    ):
        samples = generator.sample(n=1, architecture=Architecture(kind="mlp", widths=[64, 40, 10]))
    assert samples[0].module()(torch.rand(2, 64)).shape == (2, 10)
    with pytest.raises(
        MoleError, match=r"makes networks of widths \[64, 16, 10\] alone, which have a network in common"
    ):
        made(digits, common=True).sample(n=1, architecture=Architecture(kind="mlp", widths=[64, 40, 10]))
    with pytest.raises(MoleError, match=r"has seen no linear-weight\[\*,\*\]_1|has seen no 2\.weight"):
        generator.sample(architecture=Architecture(kind="mlp", widths=[64, 16, 16, 10]))
    with pytest.raises(
        MoleError, match="architecture mlp from 30 to 10 numbers; legal for digits is mlp from 64 to 10"
    ):
        generator.sample(architecture=Architecture(kind="mlp", widths=[30, 16, 10]))
    with pytest.raises(MoleError, match="has seen no tanh networks; it knows relu"):
        generator.sample(architecture=Architecture(kind="mlp", widths=[64, 16, 10], activation="tanh"))
    with pytest.raises(MoleError, match="architecture is 'mlp'; legal is an Architecture"):
        generator.sample(architecture="mlp")  # pyright: ignore[reportArgumentType]


@pytest.fixture
def reader(digits: Classification) -> Generator:
    """A generator that reads data."""
    config = GeneratorConfig(width=16, layers=1, heads=2, view="classes", data=True)
    codec = Codec(digits.spec, config, {word(entry): 0.1 for entry in digits.spec.entries})
    card = Card(
        format=FORMAT, denoiser=config, task=digits.config, architectures=[digits.architecture], scales=codec.stds,
        ranges={"loss": (0.1, 2.4)}, zoo="zoo", examples=64, train_steps=1, seed=0,
    )  # fmt: skip
    denoiser = Denoiser([codec.view], config, numbers=64)
    return Generator(denoiser.eval(), codec, card, torch.device("cpu"), digits)


def test_support_sets_that_cannot_be_are_refused(generator: Generator, reader: Generator) -> None:
    images, labels = torch.rand(20, 64), torch.arange(20) % 10
    samples = reader.sample(n=2, support=(images, labels))
    assert samples.provenance[0]["support"]["labels"] == labels.tolist()
    with pytest.raises(MoleError, match="told by labelled examples what its networks are for; give images"):
        reader.sample(n=1)
    for support, message in (
        ((images, labels + 5), r"labels \[10, 11, 12, 13, 14\]; legal is whole numbers from 0 to 9"),
        ((images, labels - 1), r"labels \[-1\]"),
        ((images, labels.float()), "labels torch.float32"),
        ((images[:, :-1], labels), r"images \(20, 63\) and labels \(20,\); legal is \(K, 64\)"),
        ((images, labels[:-1]), r"labels \(19,\)"),
        ((images.expand(3, -1, -1), labels.expand(3, -1)), "of 3 networks, but 2 are asked for"),
        ((images * float("nan"), labels), "not finite"),
        ("nonsense", "legal is a pair"),
    ):
        with pytest.raises(MoleError, match=message):
            reader.sample(n=2, support=support)  # pyright: ignore[reportArgumentType]
    with pytest.raises(MoleError, match="this generator reads no data"):
        generator.sample(support=(images, labels))


def test_a_card_written_before_a_setting_existed_is_read(generator: Generator, tmp_path: Path) -> None:
    generator.save(tmp_path)
    values = read_json(tmp_path / "config.json")
    del values["denoiser"]["latent_steps"]
    values["digest"] = value_digest({name: value for name, value in values.items() if name != "digest"})
    write_json(tmp_path / "config.json", values)
    assert Generator.load(tmp_path).digest == values["digest"]


def resealed(folder: Path, **changes: object) -> None:
    """Anybody can seal a card anew."""
    values = read_json(folder / "config.json")
    values |= changes
    values["digest"] = value_digest({name: value for name, value in values.items() if name != "digest"})
    write_json(folder / "config.json", values)


def test_a_card_that_asks_for_too_much_takes_no_memory(generator: Generator, tmp_path: Path) -> None:
    generator.save(tmp_path)
    denoiser = read_json(tmp_path / "config.json")["denoiser"]
    resealed(tmp_path, denoiser={**denoiser, "width": 2**16, "heads": 2})
    with pytest.raises(CorruptFileError, match=r"the card's width is 65,536, but model\.safetensors holds"):
        Generator.load(tmp_path)
    generator.save(tmp_path)
    resealed(tmp_path, ranges={})
    with pytest.raises(CorruptFileError, match="the range of the loss is missing"):
        Generator.load(tmp_path)
    resealed(tmp_path, ranges={"loss": [0.1, 2.4]}, architectures=[{"kind": "mlp", "widths": [64, *[65_536] * 9, 10]}])
    with pytest.raises(CorruptFileError, match=r"the networks of its card need about .* TB of memory"):
        Generator.load(tmp_path)
    resealed(tmp_path, denoiser={**denoiser, "layers": 900})
    with pytest.raises(CorruptFileError, match="the card's layers is 900, but"):
        Generator.load(tmp_path)
    resealed(tmp_path, architectures=[{"kind": "mlp", "widths": [64, 10**9, 10]}])
    with pytest.raises(CorruptFileError, match="less than or equal to 65536"):
        Generator.load(tmp_path)


def test_weights_and_images_that_overflow_are_refused(generator: Generator) -> None:
    huge = torch.full((1, generator.spec.size), 1e300, dtype=torch.float64)
    with pytest.raises(MoleError, match=r"starts: some weights are NaN or 1e\+06 and above"):
        generator.sample(starts=huge)
    with pytest.raises(MoleError, match="of real numbers"):
        generator.sample(starts=torch.zeros(1, generator.spec.size, dtype=torch.complex64))
    with pytest.raises(MoleError, match=r"target_los is no condition .*; nearest: target_loss"):
        generator.sample(target_los=1.0)
    network = generator.task.architecture.build(0)
    alone, listed = (generator.sample(n=int(np.int64(1)), starts=s, target_loss=1.0) for s in (network, [network]))
    assert torch.equal(alone.flat, listed.flat)


def test_starts_far_larger_than_the_training_networks_are_made_smaller(
    generator: Generator, digits: Classification
) -> None:
    """Scales are 0.1: weights of 0.8 are brought to 0.1, what lies within is left alone."""
    entry = digits.spec.entries[0]
    starts = digits.initial([5, 6]) * 0.5
    loud = starts.clone()
    loud[1, entry.offset : entry.stop] = torch.where(torch.arange(entry.size) % 2 == 0, 0.8, -0.8)
    quiet = generator.codec.quieted(loud)
    assert torch.equal(quiet[0], starts[0])
    one_scale = generator.codec.config.model_copy(update={"scale": "global"})
    assert torch.equal(Codec(digits.spec, one_scale, generator.card.scales).quieted(loud), loud)
    torch.testing.assert_close(quiet[1, entry.offset : entry.stop].abs(), torch.full((entry.size,), 0.1))
    assert torch.equal(quiet[1, entry.stop :], starts[1, entry.stop :])
    with pytest.warns(PromptWarning, match="1 of 2 starts have weights far larger"):
        samples = generator.sample(n=2, starts=loud, target_loss=0.15)
    assert torch.equal(samples.flat, generator.sample(n=2, starts=quiet, target_loss=0.15).flat)
