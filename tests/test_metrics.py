from pathlib import Path

from mole.metrics import MetricsFile


def test_rows_are_appended_and_a_stage_can_be_rewound(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path / "metrics.csv")
    metrics.rewind("train", 0)
    for step in (10, 20, 30):
        metrics.append("train", step, {"train/loss": 1 / step, "bad": float("nan")})
    metrics.append("rank", 0, {"rank/tau": 0.5})
    with metrics.path.open("a") as file:
        file.write("rank,x,foo,1\n")
        file.write("train,40,train/l")  # killed in mid-line
    with metrics.path.open("ab") as file:
        file.write(b"\nra\xffnk,0,x,1\nrank,0,rank/tau,zero\n\x00\xff\n")  # damaged
    metrics.rewind("train", 20)
    assert metrics.path.read_text().splitlines() == [
        "stage,step,metric,value", "train,10,train/loss,0.1", "train,20,train/loss,0.05", "rank,0,rank/tau,0.5",
    ]  # fmt: skip
