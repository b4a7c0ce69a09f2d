from pathlib import Path

import pytest

from mole.config import Config, load
from mole.estimate import estimate, generator_parameters, network_of, unaffordable

from .conftest import ROOT


def config(**sections: object) -> Config:
    return Config.model_validate(sections)


def test_networks_are_counted_as_they_are_built() -> None:
    assert network_of(config()).parameters == 1210  # 64-16-10
    assert network_of(config(task={"name": "mnist"})).parameters == 7960
    assert network_of(config(task={"name": "cifar10"})).parameters == 5370  # as G.pt has it
    assert generator_parameters(config()) == pytest.approx(1_314_457, rel=0.1)  # counted on the built one


def test_the_default_job_takes_minutes_and_little_memory() -> None:
    plan = estimate(load([ROOT / "configs" / "digits.yaml"]))
    assert 120 < plan.seconds < 1800 and max(plan.memory.values()) < 2e9 and plan.disk < 1e9
    assert "minutes on one core" in str(plan) and "MB of memory" in str(plan)


@pytest.mark.parametrize(
    ("sections", "key"),
    [
        ({"generator": {"parameters": 10**12}}, "generator.parameters"),
        ({"task": {"width": 60_000, "depth": 2}}, "task.width"),
        ({"evaluate": {"prompts": 10**6}}, "evaluate.prompts"),
        ({"train": {"batch_size": 10**6}}, "train.batch_size"),
    ],
)
def test_plans_that_cannot_fit_name_the_key_to_lower(sections: dict[str, object], key: str, tmp_path: Path) -> None:
    faults = unaffordable(config(runtime={"device": "cpu"}, **sections), tmp_path, free=lambda: 16 * 10**9)
    assert any(fault.startswith(f"{key}: ") and f"lower {key}" in fault for fault in faults)
    assert unaffordable(config(), tmp_path, free=lambda: 16 * 10**9, disk=lambda _: 10**12) == []


def test_a_zoo_that_does_not_fit_on_the_disk_is_refused(tmp_path: Path) -> None:
    (fault,) = unaffordable(config(), tmp_path, free=lambda: 16 * 10**9, disk=lambda _: 10**6)
    assert "writes about" in fault and "1 MB are free there" in fault
    done = unaffordable(config(), tmp_path, ["train"], lambda: 16 * 10**9, lambda _: 10**6)
    assert done == []
    wide = config(evaluate={"prompts": 10**6})
    assert unaffordable(wide, tmp_path, ["rank"], lambda: 16 * 10**9, lambda _: 10**6) == []
    (tmp_path / "zoo" / "shards").mkdir(parents=True)
    with (tmp_path / "zoo" / "shards" / "group-00000.safetensors").open("wb") as file:
        file.truncate(estimate(config()).disk - 10)  # nearly whole already
    assert unaffordable(config(), tmp_path, free=lambda: 16 * 10**9, disk=lambda _: 100) == []
