import csv
import json
import math
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file
from torch import Tensor, nn

import mole
from mole.errors import MoleError
from mole.rank import Candidate, layer_scores, leaderboard, mean_rank, see, successive_halving, weighted_tau
from mole.rank.repository import candidates, named
from mole.rank.tables import terminal

from ..conftest import run_command


def axis_network(axis: int) -> nn.Sequential:
    """Its hidden features are one of two inputs, twice."""
    network = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Identity(), nn.Linear(2, 2))
    with torch.no_grad():
        network[0].weight.copy_(torch.eye(2)[[axis, axis]])  # pyright: ignore
    return network


@pytest.fixture
def data() -> tuple[Tensor, Tensor]:
    """The first input is the class, the second is noise."""
    labels = torch.arange(40) % 2
    return torch.stack([labels * 2.0 - 1, torch.randn(40)], 1), labels


class Pair(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return self.inner(images), images


def test_networks_that_separate_the_classes_come_first(data: tuple[Tensor, Tensor]) -> None:
    board = leaderboard({"noise": axis_network(1), "class": axis_network(0)}, data, scorers=["silhouette"])
    assert [row.name for row in board.rows] == ["class", "noise"] and board.by == "silhouette"
    assert board.rows[0].scores["silhouette"] == 1


def test_one_failing_network_is_a_row_with_its_reason(data: tuple[Tensor, Tensor]) -> None:
    def broken() -> nn.Module:
        raise FileNotFoundError("gone")

    poisoned = axis_network(0)
    with torch.no_grad():
        poisoned[0].weight.fill_(float("nan"))  # pyright: ignore
    constant = axis_network(0)
    with torch.no_grad():
        constant[0].weight.zero_()  # pyright: ignore
    networks = [
        Candidate("broken", broken), Candidate("wide", lambda: nn.Linear(3, 2)), Candidate("nan", lambda: poisoned),
        Candidate("constant", lambda: constant), Candidate("pair", lambda: Pair(axis_network(0))),
        Candidate("none", lambda: nn.ReLU()), Candidate("good", lambda: axis_network(0)),
    ]  # fmt: skip
    board = leaderboard(networks, data)
    assert [row.name for row in board.rows[:2]] == ["pair", "good"]
    reasons = {row.name: row.reason for row in board.rows}
    assert reasons["broken"] == "FileNotFoundError: gone" and reasons["good"] == reasons["pair"] == ""
    assert "does not take (40, 2)" in reasons["wide"] and "40x2 and 3x2" in reasons["wide"]
    assert reasons["nan"] == "layer last hidden is NaN or infinite for 40 examples"
    assert reasons["constant"] == "features are the same for every example"
    assert "no layer of ReLU is linear" in reasons["none"]
    assert {row["rank"] for row in board.records() if row["reason"]} == {None}


def test_what_is_asked_for_wrongly_is_said_before_any_network_is_loaded(data: tuple[Tensor, Tensor]) -> None:
    inputs, labels = data
    network = {"a": axis_network(0)}
    for given, settings, message in (
        ((inputs, labels[:9]), {}, "40 inputs and 9 labels; legal is one label per input"),
        ((inputs, torch.zeros(40).long()), {}, "labels are all 0; legal is two classes or more"),
        ((inputs, None), {"scorers": ["knn"]}, r"knn cannot be had with these labels \(none\)"),
        (
            (inputs, torch.rand(40)),
            {"scorers": ["knn"]},
            r"knn cannot be had with these labels \(numbers; classes are whole",
        ),
        (data, {"scorers": ["knm"]}, "no scorer knm; nearest: "),
        (data, {"scorers": ["mean_rank"]}, "mean_rank needs others"),
        (data, {"scorers": ["mean_rnk"]}, "no scorer mean_rnk; nearest: mean_rank"),
        (data, {"scorers": "knn"}, "scorers is 'knn'; legal is a list of names"),
        (data, {"scorers": []}, r"scorers is \[\]; legal is a list of names"),
        (inputs, {}, r"data are Tensor; legal is \(inputs, labels\)"),
        ((inputs / 0, labels), {}, "inputs hold NaN or infinity"),
        ((inputs[:2], labels[:2]), {}, "2 inputs; legal is 3 or more"),
        ((inputs, labels - 1), {}, "labels go down to -1; legal is 0 and above"),
        ((inputs, "abc"), {}, "data are Tensor, str; legal is tensors"),
        (data, {"device": "cdua"}, "device 'cdua' is not here; legal is cpu, or cuda where PyTorch finds it"),
        (data, {"lacking": "eror"}, "lacking is 'eror'; legal: row, error; did you mean error?"),
    ):
        with pytest.raises(MoleError, match=message):
            leaderboard(network, given, **settings)
    twins = [Candidate("a", make), Candidate("a", make)]
    with pytest.raises(MoleError, match="names of networks must differ; several are called a"):
        leaderboard(twins, data)
    with pytest.raises(MoleError, match="there are no networks to rank"):
        leaderboard({}, data)
    with pytest.raises(MoleError, match=r"networks hold Sequential; legal is \{name: module\}, or candidates"):
        leaderboard([axis_network(0)], data)  # pyright: ignore[reportArgumentType]


def test_models_of_the_hub_are_ranked_by_their_names(tmp_path: Path) -> None:
    """With random weights; a folder stands for a name on the Hub."""
    images, labels = torch.randn(40, 3, 32, 32), torch.arange(40) % 4
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=8
    )
    transformers.ViTModel(config).save_pretrained(tmp_path / "vit")
    (candidate,) = candidates(f"transformers:{tmp_path / 'vit'}")
    board = leaderboard([candidate], (images, labels), scorers=["class_mean"])
    assert board.rows[0].scores and board.rows[0].provenance["library"] == "transformers"


def test_models_of_timm_are_ranked_by_their_names(monkeypatch: pytest.MonkeyPatch) -> None:
    images, labels = torch.randn(40, 3, 32, 32), torch.arange(40) % 4
    timm = pytest.importorskip("timm", reason="timm is not installed")
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained: create(name, pretrained=False))
    board = leaderboard(candidates("timm:resnet10t"), (images, labels), scorers=["class_mean"])
    assert board.rows[0].scores and board.rows[0].name == "timm:resnet10t"


def test_a_layer_that_some_lack_is_a_row_or_an_error_that_names_them(data: tuple[Tensor, Tensor]) -> None:
    networks = {"short": nn.Sequential(nn.Linear(2, 2)), "long": axis_network(0)}
    board = leaderboard(networks, data, layer="2")
    assert [row.name for row in board.rows if row.scores] == ["long"]
    assert "no layer '2' in Sequential; nearest: 0" in board.rows[-1].reason
    with pytest.raises(MoleError, match="layer '2' is not in short; legal is a layer of all"):
        leaderboard(networks, data, layer="2", lacking="error")
    with pytest.raises(MoleError, match="no layer 7 in Sequential, which has 3; legal is -3 to 2"):
        see(axis_network(0), [data[0]], [7])


def test_several_scorers_give_their_mean_rank_and_duplicates_are_marked(data: tuple[Tensor, Tensor]) -> None:
    networks = {"a": axis_network(0), "b": axis_network(1), "c": axis_network(0)}
    networks["c"].load_state_dict(networks["a"].state_dict())
    board = leaderboard(networks, data, scorers=["mean_rank", "silhouette", "class_mean"])
    assert board.by == "mean_rank" and board.rows[-1].name == "b" and board.rows[-1].scores["mean_rank"] == -3
    assert board.rows[1].provenance == {"same_weights_as": "a"}
    found = mean_rank(torch.tensor([[3.0, 1.0, 2.0], [1.0, float("nan"), 2.0]]))
    assert found.tolist() == [-1.5, -3.0, -1.5]


def test_without_labels_the_network_that_is_sure_and_varied_wins(data: tuple[Tensor, Tensor]) -> None:
    sure, flat = axis_network(0), axis_network(0)
    with torch.no_grad():
        sure[2].weight.copy_(torch.tensor([[9.0, 0.0], [-9.0, 0.0]]))  # pyright: ignore
        flat[2].weight.zero_()  # pyright: ignore
    board = leaderboard({"flat": flat, "sure": sure}, (data[0], None), scorers=["mutual_information"])
    assert board.rows[0].name == "sure"
    assert board.rows[0].scores["mutual_information"] == pytest.approx(math.log(2), abs=0.01)


def test_agreement_is_how_often_a_network_gives_the_answer_of_another_one(tmp_path: Path) -> None:
    def constant(answer: int, outputs: int = 2, size: float = 1.0) -> nn.Sequential:
        network = nn.Sequential(nn.Linear(2, outputs))
        with torch.no_grad():
            network[0].weight.zero_()  # pyright: ignore
            network[0].bias.copy_(size * torch.eye(outputs)[answer])  # pyright: ignore
        return network

    inputs = torch.randn(12, 2)
    networks = {"one": constant(1), "zero": constant(0), "also zero": constant(0, size=2.0), "three": constant(0, 3)}
    board = leaderboard(networks, (inputs, None), scorers=["agreement"], kept=tmp_path / "rows.jsonl")
    found = {row.name: row.scores.get("agreement") for row in board.rows}
    assert found == {"zero": 0.5, "also zero": 0.5, "one": 0.0, "three": None} and board.by == "agreement"
    alone = leaderboard({"one": networks["one"]}, (inputs, None), scorers=["agreement"])
    assert alone.rows[0].reason == "agreement: there is no other network to agree with"
    assert board.rows[-1].reason == "agreement: 3 answers where others have 2"
    runs: list[int] = []
    for network in networks.values():
        network.register_forward_hook(lambda *_: runs.append(1))
    again = leaderboard(networks, (inputs, None), scorers=["agreement"], kept=tmp_path / "rows.jsonl")
    assert {row.name: row.scores.get("agreement") for row in again.rows} == found and not runs
    both = leaderboard(networks, (inputs, None), scorers=["mean_rank", "confidence", "agreement"])
    assert both.by == "mean_rank" and set(both.rows[0].scores) == {"confidence", "agreement", "mean_rank"}
    resampled = leaderboard(networks, (inputs, None), scorers=["agreement"], bootstrap=4)
    assert resampled.resampled["zero"].tolist() == [0.5] * 4 and resampled.best_probability()["one"] == 0
    with pytest.raises(MoleError, match="agreement cannot be had with these labels"):
        leaderboard(networks, (inputs, torch.randn(12)), scorers=["agreement", "ridge"])
    with pytest.raises(MoleError, match="no scorer agreement"):
        successive_halving(networks, (inputs, None), scorer="agreement")


def test_bootstrap_says_how_sure_the_order_is(data: tuple[Tensor, Tensor]) -> None:
    networks = {"class": axis_network(0), "noise": axis_network(1), "again": axis_network(0)}
    board = leaderboard(networks, data, scorers=["silhouette"], bootstrap=20)
    assert board.best_probability() == {"class": 0.5, "again": 0.5, "noise": 0.0}
    record = board.records()[-1]
    assert record["low"] < record["silhouette"] < record["high"]
    ensemble = leaderboard(networks, data, scorers=["mean_rank", "silhouette", "class_mean"], bootstrap=20)
    assert ensemble.best_probability()["noise"] == 0 and set(ensemble.resampled) == set(networks)
    for row in ensemble.rows:
        low, high = ensemble.interval(row) or (1.0, 0.0)
        assert low <= row.scores["mean_rank"] <= high


def test_intervals_of_scorers_that_leave_one_out_hold_the_score() -> None:
    """Random labels: resampled with repetition, an example would meet its copy."""
    generator = torch.Generator().manual_seed(0)
    data = torch.randn(200, 8, generator=generator), torch.randint(3, (200,), generator=generator)
    for name in ("knn", "class_mean", "ridge", "h_score_shrunk"):
        board = leaderboard({"a": nn.Linear(8, 3)}, data, scorers=[name], bootstrap=20)
        values = board.resampled["a"]
        assert abs(values.mean() - board.rows[0].scores[name]) < 0.15, name


def test_an_interrupted_ranking_goes_on(data: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    loads: list[str] = []

    def counting(name: str, axis: int) -> Candidate:
        torch.manual_seed(axis)
        network = axis_network(axis)
        network[2].register_forward_hook(lambda *_: loads.append(name))
        return Candidate(name, lambda: network)

    networks, kept = [counting("a", 0), counting("b", 1)], tmp_path / "rows.jsonl"
    whole = leaderboard(networks, data, scorers=["knn"], kept=kept)
    lines = kept.read_text().splitlines()
    kept.write_text(lines[0] + "\n" + lines[1][:30])  # killed while it wrote
    loads.clear()
    again = leaderboard(networks, data, scorers=["knn"], kept=kept)
    assert loads == ["b"] and [row.scores for row in again.rows] == [row.scores for row in whole.rows]
    loads.clear()
    leaderboard(networks, data, scorers=["class_mean"], kept=kept)  # another question
    assert loads == ["a", "b"]
    other = nn.Sequential(*networks[0].load().children())
    other[1] = nn.Tanh()  # the same weights in another network
    found = leaderboard([Candidate("a", lambda: other)], data, scorers=["knn"], kept=kept)
    assert found.rows[0].digest != whole.rows[0].digest
    kept.write_bytes(b"\xff\xfe torn")
    assert leaderboard(networks, data, scorers=["knn"], kept=kept).rows[0].scores == whole.rows[0].scores
    assert len(kept.read_text(errors="replace").splitlines()) == 3


def test_a_failure_is_tried_again(data: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    networks = {"a": nn.Linear(3, 2)}
    assert leaderboard(networks, data, kept=tmp_path / "rows.jsonl").rows[0].reason
    assert not (tmp_path / "rows.jsonl").exists()


def test_every_layer_is_scored_in_one_pass(data: tuple[Tensor, Tensor]) -> None:
    runs: list[int] = []
    network = axis_network(0)
    network.register_forward_hook(lambda *_: runs.append(1))
    found = layer_scores(network, data, "silhouette")
    assert list(found) == ["input", "0", "1", "2"] and len(runs) == 1
    assert found["0"] == 1 > found["input"]


def test_tau_weighs_the_best_most() -> None:
    truth = torch.arange(6.0)
    top, bottom = truth.clone(), truth.clone()
    top[[4, 5]] = truth[[5, 4]]
    bottom[[0, 1]] = truth[[1, 0]]
    assert weighted_tau(truth, truth) == 1 and weighted_tau(top, truth) < weighted_tau(bottom, truth) < 1


def make() -> nn.Module:
    return axis_network(0)


def test_a_folder_of_files_needs_to_know_what_they_are_of(tmp_path: Path, data: tuple[Tensor, Tensor]) -> None:
    with pytest.raises(MoleError, match="no networks here"):
        candidates(tmp_path)
    save_file(axis_network(0).state_dict(), tmp_path / "good.safetensors")
    save_file({"x": torch.ones(1)}, tmp_path / "foreign.safetensors")
    (tmp_path / "torn.safetensors").write_bytes(b"12345678")
    with pytest.raises(MoleError, match="nothing says what networks these files are of; give a factory"):
        candidates(tmp_path)
    board = leaderboard(candidates(tmp_path, factory=make), data)
    assert [row.name for row in board.rows if not row.reason] == ["good"]
    reasons = {row.name: row.reason for row in board.rows}
    assert "Missing key" in reasons["foreign"] and "torn.safetensors" in reasons["torn"]
    assert named("torch.nn:Identity") is nn.Identity
    with pytest.raises(MoleError, match=r"factory 'json:nothing': .* legal is module:function"):
        named("json:nothing")


def test_models_of_a_library_are_ranked_as_they_are() -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=8, patch_size=4
    )
    images, labels = torch.randn(12, 3, 8, 8), torch.arange(12) % 3
    board = leaderboard({"vit": transformers.ViTForImageClassification(config)}, (images, labels), scorers=["knn"])
    assert board.rows[0].reason == "" and 0 <= board.rows[0].scores["knn"] <= 1


def test_the_command_ranks_a_zoo_and_a_runs_samples(tiny_run: Path, tmp_path: Path) -> None:
    arguments = ["rank", str(tiny_run), str(tiny_run / "samples"), "--data", "digits", "--scorer", "class_mean,knn"]
    done = run_command(*arguments, "--bootstrap", "5", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader((tmp_path / "leaderboard.csv").open()))
    assert len(rows) == 64 + 8 and [row["rank"] for row in rows] == [str(place) for place in range(1, 73)]
    scores = [float(row["class_mean"]) for row in rows]
    assert scores == sorted(scores, reverse=True) and all(row["reason"] == "" for row in rows)
    assert "generator" in json.loads(next(row for row in rows if row["name"].endswith("samples: 00000"))["provenance"])
    assert pq.read_table(tmp_path / "leaderboard.parquet").num_rows == 72
    assert (tmp_path / "leaderboard.png").read_bytes().startswith(b"\x89PNG") and "class_mean" in done.stdout
    kept = (tmp_path / "rows.jsonl").read_text()
    again = run_command(*arguments, "--bootstrap", "5", "--out", str(tmp_path))
    assert again.returncode == 0 and (tmp_path / "rows.jsonl").read_text() == kept
    np.savez(tmp_path / "own.npz", inputs=np.random.default_rng(0).normal(size=(20, 5)), labels=np.arange(20) % 2)
    wrong = run_command("rank", str(tiny_run / "samples"), "--data", str(tmp_path / "own.npz"))
    assert wrong.returncode == 1 and "all 8 networks: Sequential does not take" in wrong.stderr
    np.savez(tmp_path / "long.npz", inputs=np.ones((5, 2)), labels=np.arange(9))
    np.savez(tmp_path / "objects.npz", inputs=np.array([None, 1]))
    (tmp_path / "torn.npz").write_bytes(b"PK\x03\x04")
    for bad, message in (
        (["--data", "digit"], "--data digit; legal: digits, mnist"),
        (["--data", "digits", "--labels", "0,x"], "--labels x; legal: 0, 1, 2"),
        (["--data", str(tmp_path / "long.npz")], "5 inputs, labels (9,) int64; legal is an .npz"),
        (["--data", str(tmp_path / "objects.npz")], "objects, which would be code); legal is an .npz"),
        (["--data", str(tmp_path / "torn.npz")], "legal is an .npz"),
        (["--data", "digits", "--examples", "0"], "--examples is 0; legal is 3 or more"),
        (["--data", "digits", "--scorer", "knnn"], "no scorer knnn; nearest: knn"),
    ):  # fmt: skip
        done = run_command("rank", str(tiny_run), *bad)
        assert done.returncode != 0 and message in done.stderr and "Traceback" not in done.stderr, bad


def test_it_is_there_from_the_top() -> None:
    assert mole.leaderboard is leaderboard


def noisy_network(noise: float) -> nn.Sequential:
    """Hidden features that mix the class with the noise input."""
    network = axis_network(0)
    with torch.no_grad():
        network[0].weight.copy_(torch.tensor([[1.0, noise], [1.0, -noise]]))  # pyright: ignore
    return network


def test_halving_finds_the_best_at_a_fifth_of_the_evaluations() -> None:
    labels = torch.arange(320) % 2
    data = torch.stack([labels * 2.0 - 1, torch.randn(320)], 1), labels
    networks = {f"noise {level}": noisy_network(level) for level in range(16)}
    found = successive_halving(networks, data, scorer="silhouette")
    whole = leaderboard(networks, data, scorers=["silhouette"])
    assert found.order[0] == whole.rows[0].name == "noise 0" and sorted(found.order) == sorted(networks)
    assert found.share == found.evaluations / (320 * 16) == pytest.approx(6 / 32)
    networks["broken"] = nn.Linear(3, 3)  # pyright: ignore
    networks["constant"] = noisy_network(0)
    with torch.no_grad():
        networks["constant"][0].weight.zero_()  # pyright: ignore
    failed = successive_halving(networks, data, scorer="silhouette").failed
    assert "does not take" in failed["broken"] and failed["constant"] == "features are the same for every example"
    with pytest.raises(MoleError, match=r"round 1, 5 examples: no network could be scored \(linear_probe"):
        successive_halving({"a": noisy_network(0)}, (data[0][:80], labels[:80]), scorer="linear_probe")
    with pytest.raises(MoleError, match="rounds is 9; legal for 320 examples is 1 to 7"):
        successive_halving(networks, data, rounds=9)


def test_a_narrow_terminal_shows_names_before_scorers(data: tuple[Tensor, Tensor]) -> None:
    networks = {f"samples/{axis:05}.safetensors": axis_network(axis) for axis in (0, 1)}
    board = leaderboard(networks, data, scorers=["silhouette", "class_mean", "neuralrank", "knn"], bootstrap=4)
    text = {}
    for width in (80, 160):
        console = Console(width=width)
        with console.capture() as captured:
            console.print(terminal(board, width=width))
        text[width] = captured.get()
    assert "samples/0000" in text[80] and "best_probability" in text[80] and "with --out or a wider" in text[80]
    assert "samples/00000.safetensors" in text[160] and "mean_rank" in text[160] and "wider" not in text[160]
