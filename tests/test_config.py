from pathlib import Path

import pytest

from mole.config import Config, keys, load, to_yaml
from mole.errors import ConfigError

from .conftest import CONFIGS


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_files_are_layered_left_to_right_and_overrides_come_last(tmp_path: Path) -> None:
    first = write(tmp_path, "a.yaml", "train: {steps: 10, batch_size: 8}\nseed: 1\n")
    second = write(tmp_path, "b.yaml", "train: {steps: 20}\n")
    config = load([first, second], [("train.batch_size", "16")])
    assert (config.train.steps, config.train.batch_size, config.seed) == (20, 16, 1)


def test_every_mistake_is_named_at_once_with_file_key_found_legal_and_nearest(tmp_path: Path) -> None:
    path = write(
        tmp_path, "a.yaml", "train:\n  stepz: 3\n  steps: -1\ntask:\n  name: digit\n  width: yes\nharvest: 3\n"
    )
    with pytest.raises(ConfigError) as caught:
        load([path], [("train.learning_rate", "fast")])
    text = str(caught.value)
    assert len(caught.value.mistakes) == 6
    assert f"{path}: train.stepz: unknown key; legal here: batch_size" in text
    assert "did you mean train.steps?" in text
    assert f"{path}: train.steps: found -1 (int); legal: a whole number of at least 1" in text
    assert f"{path}: task.name: found 'digit' (str); legal: one of digits, mnist, fashion_mnist" in text
    assert "did you mean digits?" in text
    assert f"{path}: task.width: found True (bool); legal: a whole number of at least 1" in text
    assert f"{path}: harvest: found 3 (int); legal: a mapping with mode, backend, runs, heldout_runs" in text
    assert "command line: train.learning_rate: found 'fast' (str); legal: a number of at least 1e-12" in text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- 1\n- 2\n", "legal is a mapping of sections"),
        ("train: [\n", "not valid YAML"),
        ("seed: 1\nseed: 2\n", "key 'seed' appears twice"),
        ("!!python/object/apply:os.system ['true']\n", "not valid YAML"),
        ("train: {steps: 1.5}\n", "train.steps: found 1.5 (float); legal: a whole number of at least 1"),
        ("train: {learning_rate: .nan}\n", "train.learning_rate: found nan (float)"),
        ("generator: {width: 100, heads: 3}\n", "generator: width 100 must be a multiple of heads 3"),
        ("sample: {networks: 65}\n", "sample.networks is 65, but there are only 64 held-out runs"),
        ("task: {steps: 5}\n", "harvest.checkpoints is 30, but a run of task.steps 5 has only 6 states"),
        ("a: {<<: *b}\n", "not valid YAML"),
        ("? [1, 2]\n: 3\n", "not valid YAML"),
        ("1: 2\n", "1: unknown key"),
    ],
)
def test_bad_files_are_refused_with_a_reason(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load([write(tmp_path, "bad.yaml", text)])
    assert message in str(caught.value)


def test_binary_and_missing_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "binary.yaml").write_bytes(b"\x80\x04\x95\xff")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load([tmp_path / "binary.yaml"])
    write(tmp_path, "digits.yaml", "")
    with pytest.raises(ConfigError, match=r"digit\.yaml: no such file; did you mean .*digits\.yaml\?"):
        load([tmp_path / "digit.yaml"])
    with pytest.raises(ConfigError, match="a folder; legal is a regular file"):
        load([tmp_path])


def test_numbers_in_scientific_notation_are_numbers(tmp_path: Path) -> None:
    path = write(tmp_path, "a.yaml", "train: {learning_rate: 1e-3, weight_decay: 1E-2}\n")
    train = load([path]).train
    assert (train.learning_rate, train.weight_decay) == (1e-3, 1e-2)


def test_what_is_printed_reads_back_equal(tmp_path: Path) -> None:
    config = load([], [("sample.target_loss", "0.25"), ("seed", "7")])
    assert load([write(tmp_path, "c.yaml", to_yaml(config))]) == config


def test_every_key_has_a_section_that_exists() -> None:
    assert "train.steps" in keys() and "seed" in keys()
    assert all(key.split(".")[0] in Config.model_fields for key in keys())


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_loads_and_says_command_hardware_time_and_result(path: Path) -> None:
    load([path])
    head = path.read_text().splitlines()[:4]
    assert [line.split(":")[0] for line in head] == ["# Command", "# Hardware", "# Time", "# Result"]


def test_a_common_network_is_refused_where_tokens_have_no_ranks_or_networks_differ() -> None:
    common = ("generator.common", "true")
    for change in (("generator.view", "graph"), ("generator.roles", "false"), ("generator.symmetry", "augment")):
        with pytest.raises(ConfigError, match="common needs symmetry equivariant, roles true, view neurons"):
            load([], [common, change])
    with pytest.raises(
        ConfigError, match=r"vary\.width, evaluate\.widths: networks of several .* or generator\.common"
    ):
        load([], [common, ("harvest.vary.width", "[8, 16]"), ("evaluate.widths", "[20]")])
    with pytest.raises(ConfigError, match=r"vary\.activation: networks of several architectures"):
        load([], [common, ("harvest.vary.activation", "[relu, tanh]")])
    assert load([], [common, ("harvest.vary.width", "[24]"), ("evaluate.widths", "[24]")]).generator.common


def test_energy_is_refused_where_nothing_is_drawn_from_pure_noise() -> None:
    for changes in ([("generator.process", "linear")], [("train.one_pass_fraction", "0")]):
        with pytest.raises(ConfigError, match=r"objective energy draws from pure noise.*legal: train\.objective mean"):
            load([], changes)
    assert load([], [("train.one_pass_fraction", "0"), ("train.objective", "mean")]).train.one_pass_fraction == 0
