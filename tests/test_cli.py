import shutil
from pathlib import Path

import pytest

from mole import cli
from mole.errors import ConfigError

from .conftest import ROOT, run_command


def test_bad_input_exits_with_2_names_every_mistake_and_never_imports_torch(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom mole.cli import main\n"
        "try:\n    main(['train', *sys.argv[1:]])\n"
        "finally:\n    print('torch' in sys.modules, 'numpy' in sys.modules)\n"
    )
    done = run_command("--train.stepz", "3", "--train.steps", "x", "--only", "harvset", "nowhere.yaml", code=code)
    assert done.returncode == 2
    assert "False False" in done.stdout
    assert "4 mistakes" in done.stderr
    assert "--train.stepz: unknown option" in done.stderr and "did you mean --train.steps?" in done.stderr
    assert "train.steps: found 'x' (str); legal: a whole number of at least 1" in done.stderr
    assert (
        "--only: found 'harvset'; legal: harvest, train, sample, evaluate, rank; did you mean harvest?" in done.stderr
    )
    assert "nowhere.yaml: no such file" in done.stderr


def test_help_and_print_config_and_dry_run_write_nothing(tmp_path: Path) -> None:
    assert "usage: python train.py" in run_command("--help").stdout
    printed = run_command("--print-config", "--seed", "5", "--out", str(tmp_path / "run"))
    assert printed.returncode == 0 and "seed: 5" in printed.stdout
    dry = run_command("--dry-run", "--out", str(tmp_path / "run"))
    assert dry.stdout.count("would run") == 5
    assert not (tmp_path / "run").exists()


def test_without_arguments_the_digits_are_run_wherever_one_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    request = cli.parse([])
    assert request.config.name == "digits" and request.out == Path("runs/digits")


def test_values_may_follow_an_equals_sign_and_may_be_negative_looking() -> None:
    assert cli.parse(["--seed=3", "--train.steps=7"]).config.train.steps == 7
    with pytest.raises(ConfigError, match="seed: found -1"):
        cli.parse(["--seed", "-1"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out"], "--out: a value is missing; legal is --out DIR"),
        (["--train.steps", "--dry-run"], "--train.steps: a value is missing"),
        (["--steps", "3"], "did you mean --task.steps"),
        (["--ony", "harvest"], "did you mean --only"),
        (["--only", "rank"], "harvest: not done yet; train: not done yet; sample: not done yet"),
        (["--only", ","], "--only: found ''"),
        (["--only", ""], "--only: the value is empty"),
        (["--dry-run=no"], "--dry-run takes no value"),
        (["--task.width", "[" * 2000], "is not a value"),
        (["--name", ".."], "name: found '..'"),
        (["--seed", "9" * 30], "seed: found 999"),
        (["--out", "/etc/passwd/x"], "/etc/passwd is a file"),
    ],
)
def test_mistakes_of_the_command_line(arguments: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        cli.parse(["--out", str(tmp_path / "none"), *arguments] if arguments != ["--out"] else arguments)
    assert message in str(caught.value)


def test_a_file_where_the_run_folder_should_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is a file; legal is a folder"):
        cli.parse(["--out", str(tmp_path / "file")])


def test_a_second_process_is_kept_out_of_the_run_folder(tmp_path: Path) -> None:
    fcntl = pytest.importorskip("fcntl")
    with (tmp_path / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        done = run_command("configs/tiny.yaml", "--out", str(tmp_path))
    assert done.returncode == 1
    assert "another process is running there" in done.stderr


def test_a_folder_that_cannot_be_made_is_said_without_a_traceback(tmp_path: Path) -> None:
    done = run_command("configs/tiny.yaml", "--out", "/proc/none")
    assert done.returncode == 1
    assert "error: /proc/none" in done.stderr and "Traceback" not in done.stderr


def test_the_script_and_the_package_are_the_same_door() -> None:
    assert "from mole.cli import main" in (ROOT / "train.py").read_text()


def test_zoos_are_shown_verified_and_filled_from_the_command_line(tiny_run: Path, tmp_path: Path) -> None:
    zoo = tmp_path / "zoo"
    shutil.copytree(tiny_run / "zoo", zoo)
    shown = run_command("zoo", "show", str(zoo))
    assert shown.returncode == 0 and "64 runs, 512 checkpoints of 1,210 parameters, float32" in shown.stdout
    sound = run_command("zoo", "verify", str(zoo))
    assert sound.returncode == 0 and "2 shards, every byte as written, and every index makes sense" in sound.stdout
    path = zoo / "shards" / "group-00001.safetensors"
    data = bytearray(path.read_bytes())
    data[5000] ^= 1
    path.write_bytes(data)
    flipped = run_command("zoo", "verify", str(zoo))
    assert flipped.returncode == 1 and f"{path}: truncated or altered" in flipped.stdout
    taken = run_command("import", str(tiny_run / "samples"), "--into", str(tmp_path / "other"), "--metric", "loss")
    assert taken.returncode == 0 and "8 checkpoints of 1 runs taken in" in taken.stdout, taken.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["zoo", "show", "/nowhere"], 1, "error: /nowhere: no zoo here (zoo.json is missing)"),
        (["zoo", "verfy", "x"], 2, "invalid choice: 'verfy'"),
        (["zoo"], 2, "the following arguments are required: action"),
        (["import", "x"], 2, "the following arguments are required: --into"),
        (["import", "/nowhere", "--into", "/tmp/zoo"], 1, "error: /nowhere: no such file or folder"),
        (["import", "x", "--into", "y", "--dtype", "int8"], 2, "invalid choice: 'int8'"),
    ],
)
def test_mistakes_in_zoo_commands_are_said_without_a_traceback(arguments: list[str], code: int, text: str) -> None:
    done = run_command(*arguments)
    assert done.returncode == code and text in done.stderr and "Traceback" not in done.stderr
