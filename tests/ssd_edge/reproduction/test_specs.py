"""The experiment files against the numbers in the paper and the settings of the learners."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest

from ssd_edge import learners
from ssd_edge.errors import InputError
from ssd_edge.reproduction import specs as module
from ssd_edge.reproduction.specs import (
    BUDGETS,
    ORDERS,
    Experiment,
    System,
    chosen,
    experiments,
    on_streams,
    options,
    streams,
    with_systems,
)
from ssd_edge.run.streams import class_order

MNIST, CIFAR10, CIFAR100 = "mnist-pixels", "cifar10", "cifar100-50x2"
# The paper's numbers by experiment and system: CIFAR-10, CIFAR-100, MNIST; None where the paper has a dash.
THREE = {
    "T1": {
        "SDMLP, k = 10": (0.71, 0.32, 0.53),
        "SI": (0.44, None, None),
        "EWC": (0.65, 0.16, 0.61),
        "SSD, k = 10": (0.81, 0.43, 0.57),
        "SSD + EWC, k = 10": (0.87, 0.52, 0.86),
        "SDMLP + EWC, k = 10": (None, None, None),  # not in the paper
    },
    "T2": {
        "SDMLP, k = 10": (0.63, 0.29, 0.53),
        "SDMLP, k = 1": (0.70, 0.25, 0.69),
        "SI": (0.34, None, 0.36),
        "EWC": (0.67, 0.12, 0.61),
        "SSD, k = 10": (0.73, 0.34, 0.55),
        "SSD, k = 1": (0.74, 0.35, 0.74),
        "SSD + EWC, k = 1": (0.80, 0.40, 0.86),
        "SDMLP + EWC, k = 1": (None, None, None),  # not in the paper
    },
}
ONE = {
    "T3": {"SDMLP, k = 10": -0.1828, "SSD, k = 10": -0.1234},
    "Ent": {"SDMLP, k = 10": 0.99, "SSD, k = 10": 0.003},
    "T4": {"selective": 0.7874, "hierarchical": 0.8056, "both": 0.8083},
    "T5": {"λ = 0.1": 0.8174, "λ = 0.3": 0.8087, "λ = 0.5": 0.8083, "λ = 0.7": 0.8001, "λ = 0.9": 0.7902},
    "F2": {"SSD, k = 10": None},
    "F3": {"n = 10": None, "n = 100": None, "n = 200": 0.8081, "n = 500": None, "n = 1000": 0.8083, "n = 2000": None},
    "F4": {f"α = {a}, T = {t}": None for a in (0.3, 0.5, 0.7, 0.9) for t in (1, 2, 4, 8)} | {"α = 0.7, T = 8": 0.8174},
    "F5": {"SSD, k = 10": None, "SDMLP, k = 10": None},
    "F6": {"all epochs": None, "a tenth": None},
    "F7": {"SSD, k = 10": 0.8174},
    "A1": {"SDMLP": 0.134, "SSD": 0.25, "EWC": None, "SI": None, "LwF": None, "iCaRL (replay)": None},
    "A2": {"SDMLP, k = 10": 0.76, "SSD, k = 10": 0.802},
}


@pytest.mark.parametrize("id", list(THREE))
def test_the_tables_have_the_numbers_of_the_paper(id: str) -> None:
    settings = {
        system.name: tuple(system.reported[stream] for stream in (CIFAR10, CIFAR100, MNIST))
        for system in experiments()[id].systems
    }
    assert settings == THREE[id]


@pytest.mark.parametrize("id", list(ONE))
def test_the_other_experiments_have_the_numbers_of_the_paper(id: str) -> None:
    experiment = experiments()[id]
    (stream,) = experiment.streams
    assert {system.name: system.reported[stream] for system in experiment.systems} == ONE[id]


def test_only_these_experiments_quote_the_paper() -> None:
    for experiment in experiments().values():
        if experiment.id not in (*THREE, *ONE):
            assert not experiment.place
            assert not any(system.reported for system in experiment.systems)


def test_all_planned_experiments_exist() -> None:
    sweeps = ["shift", "k", "n", "lambda", "scope", "lr", "epochs", "gaba", "pretraining", "ewc", "layers", "streams"]
    assert set(experiments()) == {*THREE, *ONE, "controls", "panel", *sweeps}


@pytest.mark.parametrize("id", list(experiments()))
def test_every_learner_accepts_its_settings_at_every_budget(id: str) -> None:
    experiment = experiments()[id]
    for system, stream, budget in itertools.product(experiment.systems, experiment.streams, BUDGETS):
        settings = options(experiment, system, stream, budget)
        if settings["name"] != "joint":
            known = {field.name for field in dataclasses.fields(learners.settings_class(settings["name"]))}
            assert set(settings) == {"name", *known}
        here = system.by_stream.get(stream, {})
        particular = {**system.budgets.get(budget, {}), **here.get("any", {}), **here.get(budget, {})}
        for key, value in {**system.learner, **particular}.items():
            if budget != "smoke":
                assert settings[key] == value, key  # a budget never overrides the settings of a row


def by_name(id: str, name: str) -> tuple[Experiment, System]:
    return experiments()[id], next(one for one in experiments()[id].systems if one.name == name)


def test_the_published_schedule() -> None:
    ssd = options(*by_name("T1", "SSD, k = 10"), CIFAR100, "full")
    wanted = {"neurons": 10000, "k": 10, "lr": 0.05, "epochs": 2000, "batch": 128, "clip": 1.0, "top_n": "1000"}
    assert {key: ssd[key] for key in wanted} == wanted
    assert {key: ssd[key] for key in ("ce_weight", "hidden_weight", "temperature")} == {
        "ce_weight": 0.7, "hidden_weight": 0.1, "temperature": 8.0
    }  # fmt: skip
    sdmlp = by_name("T2", "SDMLP, k = 10")
    epochs = [options(*sdmlp, stream, "full")["epochs"] for stream in (CIFAR10, CIFAR100, MNIST)]
    assert epochs == [2000, 500, 500]  # the setting of SDMLP
    assert options(*by_name("T2", "SSD, k = 10"), MNIST, "full")["epochs"] == 2000


def test_the_reduced_schedule() -> None:
    settings = options(*by_name("T1", "SSD, k = 10"), CIFAR10, "reduced")
    assert (settings["neurons"], settings["lr"], settings["epochs"], settings["top_n"]) == (1000, 0.5, 40, "100")
    assert settings == options(*by_name("T2", "SSD, k = 10"), CIFAR10, "reduced")  # so both are the same cell
    assert options(*by_name("F3", "n = 2000"), CIFAR10, "reduced")["top_n"] == "200"
    pixels = options(*by_name("T2", "SSD, k = 1"), MNIST, "reduced")
    assert pixels["pretrained"] is False
    online = options(*by_name("streams", "SDMLP"), "cifar10-online", "full")
    assert online["epochs"] == 1


def test_the_smoke_budget_is_small() -> None:
    for experiment in experiments().values():
        for system in experiment.systems:
            settings = options(experiment, system, experiment.streams[0], "smoke")
            assert settings.get("neurons", 0) <= 64
            assert settings.get("epochs", 0) <= 2


def test_orders_are_those_of_the_streams() -> None:
    for order in ORDERS[1:]:
        wanted = np.random.RandomState(order).choice(100, 100, replace=False).tolist()
        assert class_order(tuple(map(str, range(100))), f"sdmlp-{order}", 0) == wanted
    assert class_order(tuple("abc"), f"sdmlp-{ORDERS[0]}", 0) == [0, 1, 2]


def test_experiments_are_selected_by_name() -> None:
    assert [one.id for one in chosen(("t2", "ENT", "T2"))] == ["T2", "Ent"]
    assert [one.id for one in chosen(("all",))] == list(experiments())
    with pytest.raises(InputError, match=r"no experiment 'pannel'\. Did you mean 'panel'\?"):
        chosen(("pannel",))


BROKEN = [
    ("systems: []\nid: x\ntitle: x\nstreams: [cifar10]\n", "must name each of its systems once"),
    ("id: x\ntitle: x\nstreams: [cifar11]\nsystems: [{name: a, learner: {name: ncm}}]\n", "Did you mean 'cifar10'"),
    ("id: x\ntitle: x\nstreams: [cifar10]\nsystem: []\n", "unknown key 'system'. Did you mean 'systems'"),
    ("title: x\nstreams: [cifar10]\nsystems: [{name: a, learner: {name: ncm}}]\n", "is incomplete"),
    ("id: x\ntitle: x\nstreams: [cifar10]\nmetric: acuracy\nsystems: [{name: a, learner: {name: ncm}}]\n", "accuracy"),
    (
        "id: x\ntitle: x\nstreams: [cifar10]\npaired: [[a, b]]\nsystems: [{name: a, learner: {name: ncm}}]\n",
        "names 'b', which is unknown",
    ),
]


@pytest.mark.parametrize(("text", "message"), BROKEN, ids=range(len(BROKEN)))
def test_errors_in_an_experiment_file(text: str, message: str, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "01-x.yaml").write_text(text)
    monkeypatch.setattr(module, "FOLDER", tmp_path)
    with pytest.raises(InputError) as raised:
        module.experiments.__wrapped__()
    assert message in str(raised.value)


def test_streams_of_the_paper_and_our_own() -> None:
    tasks = {name: source.stream["tasks"] for name, source in streams().items()}
    assert {tasks[name] for name in (CIFAR10, MNIST, "mnist", "cifar10-blurry")} == {5}
    assert (tasks[CIFAR100], tasks["cifar100-10x10"], tasks["tiny-imagenet"]) == (50, 10, 10)


def test_selecting_streams_of_experiments() -> None:
    picked = chosen(["T2", "T4", "panel"])
    cut = on_streams(picked, ["mnist", "mnist-pixels"])
    assert {one.id: one.streams for one in cut} == {"T2": ("mnist-pixels",), "panel": ("mnist", "mnist-pixels")}
    assert on_streams(picked, []) == picked
    with pytest.raises(InputError, match=r"no.* stream 'mnits'. Did you mean 'mnist'\? They have cifar10; .*tiny"):
        on_streams(picked, ["mnits"])


def test_experiments_can_be_restricted_to_systems() -> None:
    picked = [experiments()["T1"], experiments()["T2"], experiments()["F7"]]
    cut = with_systems(picked, ["SDMLP, k = 1", "EWC"])
    assert [[system.name for system in one.systems] for one in cut] == [["EWC"], ["SDMLP, k = 1", "EWC"]]
    assert with_systems(picked, []) == picked
    with pytest.raises(InputError, match="no"):
        with_systems(picked, ["LwF"])
