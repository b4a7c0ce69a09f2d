import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

import mole
from mole import cli
from mole import stages as staging
from mole.errors import ConfigError
from mole.stages import RunFolder

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


def test_bare_mole_prints_every_command_and_trains_nothing(tmp_path: Path) -> None:
    for arguments in ((), ("--help",), ("help",)):
        done = run_command(*arguments, cwd=tmp_path, code=f"from mole.cli import main; main({list(arguments)!r})")
        assert done.returncode == 0 and not list(tmp_path.iterdir())
        for command in ("train", "zoo show", "zoo verify", "import", "rank"):
            assert f"mole {command}" in done.stdout
    wrong = run_command(code="from mole.cli import main; main(['trian'])")
    assert (
        wrong.returncode == 2
        and "no command 'trian'; legal: train, zoo, import, rank; did you mean mole train?" in (wrong.stderr)
    )
    wrong = run_command(code="from mole.cli import main; main(['configs/tiny.yaml'])")
    assert wrong.returncode == 2 and "did you mean mole train configs/tiny.yaml" in wrong.stderr
    version = run_command(code="from mole.cli import main; main(['--version'])")
    assert version.returncode == 0 and version.stdout.startswith(f"mole {mole.__version__}")


@pytest.mark.parametrize(
    ("arguments", "folder"),
    [
        ([], "digits"),
        (["--seed", "1"], "digits-s1"),
        (["--train.objective", "mean"], "digits-objective_mean"),
        (["--train.learning_rate", "1e-3", "--seed", "2"], "digits-s2-train.learning_rate_0.001"),
        (["--harvest.vary.width", "[8, 16]"], "digits-vary.width_8_16"),
        (["--tracking.mode", "disabled", "--runtime.threads", "2"], "digits"),
        (["--name", "mine", "--seed", "1"], "mine"),
        (["configs/digits.yaml", "configs/tiny.yaml"], "tiny"),
    ],
)
def test_a_run_folder_is_called_by_what_differs(
    arguments: list[str], folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # configurations come with the package
    request = cli.parse(arguments)
    assert request.out == Path("runs") / folder.replace("vary.width", "harvest.vary.width")
    assert request.config.name == request.out.name


def test_every_override_has_a_folder_of_its_own() -> None:
    values = {"task.width": ["8", "9"], "harvest.vary.labels": ["[[0, 1], [2, 3]]", "[[0, 1, 2], [2, 3]]"]}
    only = ["--only", "harvest"]
    folders = [cli.parse([f"--{key}", value, *only]).out for key, list_ in values.items() for value in list_]
    assert len(set(folders)) == 4


def test_work_of_another_configuration_is_not_replaced_without_a_word(tiny_run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(tiny_run, folder)
    before = {path: path.read_bytes() for path in folder.rglob("*.json")}
    done = run_command("configs/tiny.yaml", "--out", str(folder), "--seed", "1", "--train.steps", "9")
    assert done.returncode == 2 and "seed: 0 there, 1 asked for; train.steps: 60 there, 9 asked for" in done.stderr
    assert "--out DIR or --name NAME" in done.stderr and "--replace" in done.stderr
    assert before == {path: path.read_bytes() for path in folder.rglob("*.json")}
    (folder / "stages" / "harvest.json").unlink()  # as if it was killed in the harvest
    with pytest.raises(ConfigError, match="seed: 0 there, 1 asked for"):
        cli.parse(["configs/tiny.yaml", "--out", str(folder), "--seed", "1"])


def test_a_plan_says_how_long_it_takes_and_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    dry = run_command("--dry-run", cwd=tmp_path)
    assert "the whole job takes about" in dry.stdout and "MB of memory" in dry.stdout
    refused = run_command("--evaluate.prompts", "1000000", cwd=tmp_path)
    assert refused.returncode == 2 and "evaluate.prompts: this configuration needs about" in refused.stderr
    assert not (tmp_path / "runs" / "digits-prompts_1000000" / "zoo").exists()
    early = run_command(
        "--sample.target_loss", "1e6", "--evaluate.widths", "[70000]", "--task.learning_rate", "1e-300", cwd=tmp_path
    )
    assert "3 mistakes" in early.stderr and "of at least 1e-12" in early.stderr


def test_output_that_nobody_reads_and_letters_that_a_terminal_lacks_do_not_stop_the_job(
    tiny_run: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "\u00fcml\u00e4ut"
    shutil.copytree(tiny_run, folder)
    command = [sys.executable, str(ROOT / "train.py"), "configs/tiny.yaml", "--out", str(folder)]
    (folder / "samples" / "00000.safetensors").unlink()
    shell = " ".join(f"'{part}'" for part in command)
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {shell} | head -1"], cwd=ROOT, capture_output=True, timeout=300, check=False
    )
    assert done.returncode == 0 and (folder / "samples" / "00000.safetensors").exists(), done.stderr
    ascii_only = run_command("configs/tiny.yaml", "--out", str(folder), env={"PYTHONIOENCODING": "ascii"})
    assert ascii_only.returncode == 0 and "\\xfcml\\xe4ut" in ascii_only.stdout
    closed = subprocess.run(["bash", "-c", f"{shell} >&- 2>&-"], cwd=ROOT, timeout=300, check=False)
    assert closed.returncode == 0


def test_a_folder_whose_name_is_not_utf8_is_refused_before_the_harvest(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not UTF-8"):
        cli.parse(["configs/tiny.yaml", "--out", str(tmp_path / "a\udcff")])


def test_a_device_that_is_not_there_is_said_by_the_dry_run(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    done = run_command("--runtime.device", "cuda", "--dry-run", cwd=tmp_path)
    assert done.returncode == 1 and "runtime.device is cuda, but PyTorch finds no such device" in done.stderr


def test_the_wheel_has_every_folder_and_the_configurations() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    found = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "mole").rglob("*.py")}
    assert set(project["tool"]["setuptools"]["packages"]) == found | {"mole.configs"}
    assert project["tool"]["setuptools"]["package-dir"] == {"mole.configs": "configs"}
    texts = [path.read_text() for path in [*(ROOT / "mole").rglob("*.py"), *(ROOT / "docs").glob("*.md")]]
    assert not any(re.search(r"pip install '?\"?mole(\W|$)", text) for text in texts)  # which is somebody else's


def test_a_damaged_marker_does_not_open_the_door_to_another_configuration(tiny_run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(tiny_run, folder)
    marker = folder / "stages" / "train.json"
    marker.write_text(marker.read_text().replace('"seconds"', '"secands"', 1))
    with pytest.raises(ConfigError, match=r"train\.steps: 60 there, 7 asked for"):
        cli.parse(["configs/tiny.yaml", "--out", str(folder), "--train.steps", "7"])
    cli.parse(["configs/tiny.yaml", "--out", str(folder)])
    (folder / "stages" / "harvest.json").unlink()
    with pytest.raises(ConfigError, match=r"harvest\.dtype: float32 there, bfloat16 asked for"):
        cli.parse(["configs/tiny.yaml", "--out", str(folder), "--harvest.dtype", "bfloat16", "--only", "harvest"])


def test_what_was_begun_stays_in_the_configuration_of_a_folder(tiny_run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    for name in ("zoo", "provenance", "stages"):
        shutil.copytree(tiny_run / name, folder / name)
    for name in ("train", "sample", "evaluate", "rank"):
        (folder / "stages" / f"{name}.json").unlink()
    long = ["configs/tiny.yaml", "--out", str(folder), "--train.steps", "3000"]
    config = cli.parse(long).config
    staging.mend_records(config, RunFolder(folder))
    (folder / "training.ckpt").write_text("half done")
    short = cli.parse(["configs/tiny.yaml", "--out", str(folder), "--only", "harvest"])
    staging.mend_records(short.config, RunFolder(folder), short.stages)
    assert cli.parse(long).config == config
    with pytest.raises(ConfigError, match=r"train\.steps: 3000 there, 60 asked for"):
        cli.parse(["configs/tiny.yaml", "--out", str(folder)])
