"""Networks whose answers are no plain class logits, and that are left as they came."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import mole
from mole.errors import ChoiceError
from mole.rank import Leaderboard, leaderboard, silhouette
from mole.rank.kept import Row
from mole.rank.repository import candidates
from mole.rank.request import class_logits
from mole.rank.tables import save, terminal

from ..conftest import run_command

SCORERS = ["leep", "nce", "minus_loss", "confidence"]


def points() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 2
    return torch.randn(60, 4, generator=generator) + 4.0 * labels[:, None], labels


class Ends(nn.Module):
    """A body and a head, and whatever a person does with what comes out."""

    def __init__(self, kind: str, slope: float, outputs: int = 2) -> None:
        super().__init__()
        self.kind, self.body, self.head = kind, nn.Linear(4, 4), nn.Linear(4, outputs)
        with torch.no_grad():
            self.body.weight.copy_(torch.eye(4))
            self.body.bias.zero_()
            self.head.weight.zero_()
            self.head.weight[-1] = slope / 4
            self.head.bias.zero_()
            self.head.bias[-1] = -2.0 * slope

    def forward(self, x: Tensor) -> object:
        hidden = self.body(x)
        logits = self.head(hidden)
        return {
            "plain": logits, "softmax": logits.softmax(1), "sigmoid": logits.sigmoid(), "tuple": (hidden, logits),
            "dict": {"loss": torch.tensor(0.0), "logits": logits}, "flat": logits[:, 0],
        }[self.kind]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "outputs"), [("plain", 1), ("flat", 1), ("sigmoid", 1), ("softmax", 2), ("tuple", 2), ("dict", 2)]
)
def test_a_good_network_is_told_from_a_bad_one_whatever_it_ends_with(kind: str, outputs: int) -> None:
    inputs, labels = points()
    networks = {"bad": Ends(kind, 0.01, outputs), "good": Ends(kind, 5.0, outputs)}
    plain = {"bad": Ends("plain", 0.01), "good": Ends("plain", 5.0)}
    board = leaderboard(networks, (inputs, labels), scorers=SCORERS)
    expected = leaderboard(plain, (inputs, labels), scorers=SCORERS)
    assert [row.name for row in board.rows] == ["good", "bad"] and not any(row.reason for row in board.rows)
    for row, other in zip(board.rows, expected.rows, strict=True):
        assert row.scores["minus_loss"] == pytest.approx(other.scores["minus_loss"], abs=1e-4)
        assert row.scores["leep"] == pytest.approx(other.scores["leep"], abs=1e-4)


def test_outputs_that_are_shares_become_logarithms() -> None:
    shares = torch.tensor([[0.25, 0.75], [0.5, 0.5]])
    found = class_logits(shares)
    assert found is not None
    torch.testing.assert_close(found.softmax(1), shares)
    one = class_logits(torch.tensor([[0.0], [3.0]]))
    assert one is not None and one.tolist() == [[0, 0], [0, 3]]
    assert class_logits(torch.empty(3, 0)) is None


def test_truth_values_arrays_and_half_precision_are_read() -> None:
    inputs, labels = points()
    networks = {"bad": Ends("plain", 0.01), "good": Ends("plain", 5.0)}
    first = leaderboard(networks, (inputs, labels), scorers=["leep"])
    for other in (labels.float(), labels.bool(), labels.numpy(), labels.double().numpy()):
        again = leaderboard(networks, (inputs.numpy(), other), scorers=["leep"])
        assert [row.scores for row in again.rows] == [row.scores for row in first.rows]
    half = {name: network.to(torch.bfloat16) for name, network in networks.items()}
    assert [row.name for row in leaderboard(half, (inputs, labels), scorers=["leep"]).rows] == ["good", "bad"]
    assert silhouette(inputs.numpy(), labels.numpy()) == silhouette(inputs, labels)


def test_several_tensors_without_a_name_are_no_answers_but_have_features() -> None:
    class Two(Ends):
        def forward(self, x: Tensor) -> object:
            hidden = self.body(x)
            return hidden, self.head(hidden) * 2

    inputs, labels = points()
    (row,) = leaderboard({"two": Two("plain", 1.0)}, (inputs, labels), scorers=["class_mean", "leep"]).rows
    assert "class_mean" in row.scores and "leep" not in row.scores
    assert "leep needs outputs (a network's one tensor, or several with one named logits)" in row.reason


def test_networks_are_left_in_the_mode_that_each_part_came_with() -> None:
    inputs, labels = points()
    network = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 2))
    network.train()
    network[1].eval()  # frozen statistics
    before = {name: value.clone() for name, value in network.state_dict().items()}
    leaderboard({"a": network}, (inputs, labels))
    assert [part.training for part in network] == [True, False, True, True] and network.training
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())


def test_metrics_that_are_not_there_are_refused_with_the_nearest_name() -> None:
    inputs, labels = points()
    with pytest.raises(ChoiceError, match=r"metric is 'euclidean'; legal: cosine, sqeuclidean; did you mean sqeuclid"):
        mole.silhouette(inputs, labels, metric="euclidean")  # type: ignore[arg-type]
    with pytest.raises(ChoiceError, match="variant is 'centre'; legal: standard, centroid"):
        mole.silhouette(inputs, labels, variant="centre")  # type: ignore[arg-type]


def test_names_with_markup_and_control_characters_are_shown_as_they_are(tmp_path: Path) -> None:
    names = ["x[/b]", "[red]y", "z\x1b[2J", "$w$"]
    rows = [Row(name, {"leep": -float(place)}, "", 0.0, str(place), {}) for place, name in enumerate(names)]
    board = Leaderboard.of(rows, ["leep"], "leep")
    from rich.console import Console

    console = Console(width=100, record=True, file=(tmp_path / "out").open("w"))
    console.print(terminal(board))
    text = console.export_text()
    assert "x[/b]" in text and "[red]y" in text and "z\\x1b[2J" in text and "\x1b[2J" not in text
    assert all(path.exists() for path in save(board, tmp_path))


def test_a_row_that_was_edited_is_scored_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    inputs, labels = points()
    networks = {"bad": Ends("plain", 0.01), "good": Ends("plain", 5.0)}
    kept = tmp_path / "rows.jsonl"
    first = leaderboard(networks, (inputs, labels), scorers=["leep"], kept=kept)
    lines = kept.read_text().splitlines()
    place = next(i for i, line in enumerate(lines) if '"name": "bad"' in line)
    score = next(row.scores["leep"] for row in first.rows if row.name == "bad")
    lines[place] = lines[place].replace(str(score), "9.0")
    kept.write_text("\n".join(lines) + "\n")
    again = leaderboard(networks, (inputs, labels), scorers=["leep"], kept=kept)
    assert [row.scores for row in again.rows] == [row.scores for row in first.rows]
    assert "1 rows were altered; these networks are scored again" in caplog.text


def test_another_network_under_a_recorded_name_gets_neither_its_record_nor_a_score(
    tiny_run: Path, tmp_path: Path
) -> None:
    import shutil

    shutil.copytree(tiny_run, tmp_path / "run")
    path = tmp_path / "run" / "samples" / "00000.safetensors"
    state = load_file(path)
    save_file({name: tensor + 1 for name, tensor in state.items()}, path)
    inputs, labels = torch.rand(40, 64), torch.arange(40) % 10
    rows = {row.name: row for row in leaderboard(candidates(tmp_path / "run" / "samples"), (inputs, labels)).rows}
    assert "not the network that the ledger records under this name" in rows["00000"].reason
    assert not rows["00000"].scores and rows["00001"].scores and "generator" in rows["00001"].provenance

    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))

    told = {c.name: c.provenance for c in candidates(tmp_path / "run" / "samples", factory=make)}
    assert "generator" not in told["00000"] and "generator" in told["00001"]


def test_samples_and_checkpoints_can_be_compared_and_sliced(tiny_run: Path, tmp_path: Path) -> None:
    samples = mole.load(tiny_run).sample(n=3, target_loss=1.0)
    assert samples[0] == samples[0] and samples[0] != samples[1] and samples != samples[:2] and len({*samples}) == 3
    with pytest.raises(mole.MoleError, match=r"x\.pt: the file is safetensors; legal is a name that ends in"):
        samples[0].save(tmp_path / "x.pt")
    zoo = mole.Zoo(tiny_run / "zoo")
    assert len(zoo[0:5]) == 5 and zoo[0:5][4] == zoo[4] and zoo[np.int64(3)] == zoo[3] and zoo[3] != zoo[4]
    with pytest.raises(mole.MoleError, match="no checkpoint is left"):
        zoo[5:5]


def test_raw_logits_between_0_and_1_are_no_probabilities_and_unsigned_labels_are_labels() -> None:
    inputs, labels = points()
    network = Ends("plain", 0.05, 1)
    with torch.no_grad():
        network.head.bias.fill_(0.3)  # every logit within 0 and 1
    (row,) = leaderboard({"a": network}, (inputs, labels.numpy().astype(np.uint16)), scorers=["minus_loss"]).rows
    logits = network.head(network.body(inputs))[:, 0]
    assert bool(((logits > 0) & (logits < 1)).all())
    expected = -nn.functional.binary_cross_entropy_with_logits(logits, labels.float())
    assert row.scores["minus_loss"] == pytest.approx(float(expected), abs=1e-5)


def test_a_file_name_that_was_used_twice_is_told_by_its_weights(tiny_run: Path, tmp_path: Path) -> None:
    import shutil

    from mole.provenance import Ledger

    shutil.copytree(tiny_run, tmp_path / "run")
    ledger = Ledger(tmp_path / "run" / "provenance" / "ledger.jsonl")
    first = next(record for record in ledger.records if record.get("file") == "samples/00000.safetensors")
    other = {key: value for key, value in first.items() if key != "id"} | {"weights": "0" * 64, "prompt": {"loss": 9}}
    ledger.append([other])  # a later sampling, whose files were replaced by the first one again
    rows = {c.name: c for c in candidates(tmp_path / "run" / "samples")}
    assert rows["00000"].provenance["prompt"] == first["prompt"] and rows["00000"].load() is not None


def test_a_finished_ranking_is_not_replaced_by_another_and_losses_are_not_needed(
    tiny_run: Path, tmp_path: Path
) -> None:
    command = ("rank", str(tiny_run / "samples"), "--data", "digits", "--scorer", "class_mean", "--out", str(tmp_path))
    assert run_command(*command).returncode == 0
    before = (tmp_path / "leaderboard.csv").read_bytes()
    done = run_command(*command, "--labels", "0,1")
    assert done.returncode == 2 and "labels: None there, 0,1 asked for" in done.stderr and "--replace" in done.stderr
    assert (tmp_path / "leaderboard.csv").read_bytes() == before
    assert run_command(*command, "--labels", "0,1", "--replace").returncode == 0
    mole.import_checkpoints(tiny_run / "samples", tmp_path / "zoo")
    (first,) = candidates(
        tmp_path / "zoo", factory=lambda: nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))
    )
    assert first.load() is not None
