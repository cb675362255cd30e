"""Cells of a reproduction: file names, identity, and the store."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from ssd_edge import learners
from ssd_edge.errors import BundleRefusedError
from ssd_edge.reproduction import cells
from ssd_edge.reproduction.cells import Provenance, Setup, Store
from ssd_edge.reproduction.specs import experiments

ANSWERER = Provenance("data", "backbone", {"source": "backbone"})


def ncm(**settings: object) -> Setup:
    return Setup("cifar10", {"name": "ncm", **settings}, 3)


def sdmlp(**settings: object) -> Setup:
    values = dataclasses.asdict(learners.settings_class("sdmlp")(**settings))
    return Setup("cifar10", {"name": "sdmlp", **values}, 3)


def result(cell: dict, **more: object) -> dict:
    return {"spec": cell, "stand_in": False, "accuracy": 0.5, **more}


def test_file_names_are_readable_and_independent_of_the_key_order() -> None:
    cell = cells.spec(sdmlp(k=1, lr=0.05, epochs=2000), ANSWERER)
    name = cells.file_name(cell)
    assert name.startswith("cifar10/sdmlp-k1-epochs2000-lr0.05-")
    assert name.endswith("-3.json")
    backwards = json.loads(json.dumps(cell, sort_keys=True))
    turned = {key: backwards[key] for key in sorted(backwards, reverse=True)}
    turned["settings"] = dict(reversed(turned["settings"].items()))
    turned["asked"]["learner"] = dict(reversed(turned["asked"]["learner"].items()))
    assert cells.file_name(turned) == name


def test_file_names_are_stable() -> None:
    # a change would orphan the stored results
    assert cells.file_name(cells.spec(ncm(), Provenance("data", "backbone"))) == "cifar10/ncm-bb0f1843-3.json"


def test_only_cells_that_differ_in_the_order_share_a_hash() -> None:
    def digest(setup: Setup, provenance: Provenance = ANSWERER) -> str:
        return cells.file_name(cells.spec(setup, provenance)).rsplit("-", 2)[1]

    base = sdmlp()
    assert digest(base) == digest(dataclasses.replace(base, order=97))
    others = [
        digest(sdmlp(k=3)),
        digest(dataclasses.replace(base, stream="mnist")),
        digest(dataclasses.replace(base, images=(40, 20))),
        digest(dataclasses.replace(base, trace=40)),
        digest(base, dataclasses.replace(ANSWERER, data="other")),
        digest(base, dataclasses.replace(ANSWERER, backbone="other")),
        digest(base, dataclasses.replace(ANSWERER, keys={"source": "random"})),
    ]
    assert len({digest(base), *others}) == 8


def test_results_are_found_by_setup_alone(tmp_path: Path) -> None:
    setup = sdmlp(k=3)
    cell = cells.spec(setup, ANSWERER)
    assert not cells.is_stored(tmp_path, cell)
    cells.write(tmp_path / cells.file_name(cell), result(cell))
    assert cells.is_stored(tmp_path, cell)
    store = Store(tmp_path)
    assert store.find(setup)["accuracy"] == 0.5
    assert store.find(dataclasses.replace(setup, order=0)) is None
    assert store.find(sdmlp()) is None
    assert len(list(store)) == 1


def test_a_new_setting_keeps_stored_results_and_a_changed_default_does_not(tmp_path: Path) -> None:
    setup = sdmlp(k=3)
    cell = cells.spec(setup, ANSWERER)
    before = json.loads(json.dumps(cell))
    del before["settings"]["batch"]  # as if the setting did not exist when the cell ran
    assert cells.file_name(before) == cells.file_name(cell)
    cells.write(tmp_path / cells.file_name(cell), result(before))
    assert cells.is_stored(tmp_path, cell)
    before["settings"]["batch"] = 999  # the default was different then
    cells.write(tmp_path / cells.file_name(cell), result(before))
    assert not cells.is_stored(tmp_path, cell)
    assert Store(tmp_path).find(setup) is None


def test_real_data_is_preferred_to_a_stand_in(tmp_path: Path) -> None:
    setup = ncm()
    for data, stand_in, accuracy in (("a", True, 0.1), ("b", False, 0.2)):
        cell = cells.spec(setup, Provenance(data, "backbone"))
        cells.write(tmp_path / cells.file_name(cell), {**result(cell), "stand_in": stand_in, "accuracy": accuracy})
    assert Store(tmp_path).find(setup)["accuracy"] == 0.2


def test_a_file_that_is_not_a_result_is_refused(tmp_path: Path) -> None:
    (tmp_path / "cifar10").mkdir()
    (tmp_path / "cifar10" / "x.json").write_text("{}")
    with pytest.raises(BundleRefusedError, match=r"x\.json is not a stored result"):
        Store(tmp_path)


def test_files_are_canonical_json_with_six_decimals(tmp_path: Path) -> None:
    path = tmp_path / "cifar10" / "x.json"
    cells.write(path, {"b": [1 / 3, {"c": -1e-9}], "a": "é"})
    assert path.read_text() == '{\n"a": "é",\n"b": [0.333333, {"c": 0.0}]\n}\n'
    assert json.loads(path.read_text()) == {"a": "é", "b": [0.333333, {"c": 0.0}]}


def test_the_upper_bound_has_as_many_neurons_up_to_a_thousand() -> None:
    bound = cells.upper_bound(sdmlp(neurons=64))
    assert (bound.learner["name"], bound.learner["neurons"], bound.order) == ("joint", 64, 3)
    assert bound.learner["optimiser"] == "adamw"  # joint training has its own schedule
    assert cells.upper_bound(ncm()).learner["neurons"] == 1000
    assert cells.upper_bound(sdmlp(neurons=10_000)).learner["neurons"] == 1000


def test_experiments_share_cells() -> None:
    def keys(id: str, budget: str) -> set[str]:
        experiment = experiments()[id]
        return {
            setup.key()
            for system in experiment.systems
            for setup in cells.setups(experiment, system, "cifar10", budget, 1)
        }

    assert keys("T3", "reduced") < keys("T1", "reduced")
    assert len(keys("T1", "reduced") & keys("T2", "reduced")) == 4  # all except SSD + EWC, whose k differs
    assert not keys("T1", "full") & keys("T2", "full")


def test_orders_follow_the_budget_and_the_experiment() -> None:
    def orders(id: str, budget: str, count: int | None = None) -> list[int]:
        experiment = experiments()[id]
        return [one.order for one in cells.setups(experiment, experiment.systems[0], "cifar10", budget, count)]

    assert orders("T3", "smoke") == [0]
    assert orders("T3", "reduced") == [0, 3, 15]
    assert orders("T3", "full") == [0, 3, 15, 27, 97]
    assert orders("T3", "reduced", 2) == [0, 3]
    assert orders("F2", "full") == [0]
