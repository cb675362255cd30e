"""``learner.name=auto``: the chosen learner, the sentence that explains it, and its record in a run."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner

from ssd_edge.cli.config import config
from ssd_edge.cli.train import train
from ssd_edge.config import TrainConfig, parse
from ssd_edge.errors import BundleRefusedError, InputError
from ssd_edge.learners import AUTO, LEARNERS, auto, build, pack, restore, settings_of
from ssd_edge.learners.auto import CANDIDATES, DEFAULT, decide, split
from ssd_edge.learners.priors import Priors
from ssd_edge.report.wording import describe_choice
from ssd_edge.run import finished, storage

pytestmark = pytest.mark.usefixtures("one_thread")

QUICK = ("learner.name=auto", "backbone=tiny", "run.panel=false", "run.baselines=false", "run.threads=1")
DIGITS = ("data.path=digits", "data.classes=0:4", "data.max_per_class=12")
SIZES = {"slda": 1_700_000, "ranpac": 16_200_000, "fecam": 26_000_000, "ridge": 900_000, "ncm": 4_000}


@pytest.fixture
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip the candidate whose 2,000 features take seconds to solve."""
    monkeypatch.setattr(auto, "CANDIDATES", tuple(name for name in CANDIDATES if name != "ranpac"))


def blobs(classes: int, images: int, noise: float, stretch: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Classes around random means, with the noise `stretch` times as large in four directions of 32."""
    generator, dim = torch.Generator().manual_seed(0), 32
    means, labels = torch.randn(classes, dim, generator=generator), torch.arange(classes).repeat_interleave(images)
    basis, _ = torch.linalg.qr(torch.randn(dim, dim, generator=generator))
    scales = torch.tensor([stretch] * 4 + [1.0] * (dim - 4))
    return means[labels] + noise * (torch.randn(len(labels), dim, generator=generator) * scales) @ basis, labels


def hits(count: int, wrong: list[int]) -> np.ndarray:
    right = np.ones(count, dtype=bool)
    right[wrong] = False
    return right


def decided(count: int, **wrong: list[int]) -> auto.Choice:
    """Return the choice if each candidate is wrong on these samples."""
    return decide({name: hits(count, where) for name, where in wrong.items()}, SIZES, 9)


def test_the_nearest_mean_where_few_images_with_equal_noise_allow_no_more(quickly: None) -> None:
    choice = auto.choose(*blobs(300, 4, 1.0), Priors(), seed=3)
    assert choice.name == "ncm"
    pattern = r"^ncm: 0\.8\d\d on 300 held-out training images; .*slda 0\.8\d\d is \d+\.\d po"
    assert re.match(pattern, choice.sentence)
    assert (choice.learned, choice.held_out) == (900, 300)
    rows = {row.name: row for row in choice.rows}
    assert set(rows) == set(auto.CANDIDATES)
    assert not rows["slda"].tied
    assert rows["ncm"].state_bytes == min(row.state_bytes for row in choice.rows)
    assert auto.choose(*blobs(300, 4, 1.0), Priors(), seed=3) == choice


def test_a_covariance_where_the_noise_has_directions(quickly: None) -> None:
    choice = auto.choose(*blobs(200, 3, 0.7, stretch=8.0), Priors())
    rows = {row.name: row for row in choice.rows}
    assert choice.name == "slda"
    assert rows["slda"].accuracy > rows["ncm"].accuracy + 0.5
    assert rows["slda"].behind == rows["slda"].standard_error == 0


def test_every_candidate_is_a_learner_with_closed_form_and_the_default_is_one() -> None:
    assert set(CANDIDATES) <= set(LEARNERS)
    assert DEFAULT in CANDIDATES
    assert TrainConfig().learner == {"name": DEFAULT}
    assert not any(hasattr(settings_of({"name": name}), "epochs") for name in CANDIDATES)


def test_a_class_of_one_image_is_learned_and_not_held_out() -> None:
    labels = np.repeat([0, 2, 3, 5, 7], [1, 2, 9, 10, 2000])
    rng = np.random.default_rng(0)
    labels = labels[rng.permutation(len(labels))]
    learned, held_out = split(labels, seed=4)
    assert np.bincount(labels[learned]).tolist() == [1, 0, 1, 8, 0, 8, 0, 1000]
    assert np.bincount(labels[held_out]).tolist() == [0, 0, 1, 1, 0, 2, 0, 200]
    assert not set(learned) & set(held_out)
    again, other = split(labels, seed=4), split(labels, seed=5)
    assert np.array_equal(again[1], held_out)
    assert not np.array_equal(other[1], held_out)


def test_with_single_images_there_is_nothing_to_compare(quickly: None) -> None:
    choice = auto.choose(*blobs(5, 1, 0.1), Priors())
    assert choice.name == DEFAULT
    assert choice.sentence == "slda: the default, for no class has a second training image that could be held out"
    assert [row.accuracy for row in choice.rows] == [None] * len(auto.CANDIDATES)
    assert json.loads(json.dumps(choice.to_json()))["held_out"] == 0
    assert "Candidates: slda (" in describe_choice(choice.to_json())


def test_two_images_per_class_are_enough(quickly: None) -> None:
    choice = auto.choose(*blobs(3, 2, 0.1), Priors())
    assert (choice.learned, choice.held_out) == (3, 3)
    assert all(0 <= row.accuracy <= 1 for row in choice.rows)


def test_the_default_is_taken_where_it_is_best() -> None:
    choice = decided(2000, slda=list(range(462)), ranpac=list(range(498)))
    assert choice.name == "slda"
    assert choice.sentence == (
        "slda: 0.769 on 2,000 held-out training images; next ranpac 0.751 (16.2 MB against 1.7 MB)"
    )


def test_the_default_is_taken_where_it_is_as_good() -> None:
    """One sample more is one standard error exactly: a tie, however the square root is rounded."""
    for count in (3, 7, 10, 49, 1000, 2000):
        choice = decided(count, slda=[0], fecam=[], ncm=[0, 1, 2])
        assert choice.name == "slda"
        assert [row.name for row in choice.rows] == ["fecam", "slda", "ncm"]
    assert choice.sentence == (
        "slda: 1.000 on 2,000 held-out training images; fecam 1.000 is 0.05 points ahead, no more than the "
        "standard error of 0.05 (26.0 MB against 1.7 MB)"
    )


def test_another_is_taken_where_it_is_better_by_more_than_chance() -> None:
    choice = decided(1000, slda=list(range(88)), fecam=list(range(75)), ncm=list(range(200)))
    assert choice.name == "fecam"
    assert choice.sentence == (
        "fecam: 0.925 on 1,000 held-out training images; slda 0.912 is 1.3 points behind, more than the standard "
        "error of 0.4"
    )


def test_the_smallest_of_those_that_are_better_by_more_than_chance() -> None:
    choice = decided(100, slda=list(range(20)), fecam=[], ranpac=[0], ridge=[1], ncm=list(range(30)))
    assert choice.name == "ridge"
    assert choice.sentence == (
        "ridge: 0.990 on 100 held-out training images; fecam 1.000 is 1.0 point ahead, no more than the standard error "
        "of 1.0 (26.0 MB against 900 kB); slda 0.800 is 20.0 points behind fecam, more than the standard error "
        "of 4.0"
    )


def test_the_comparison_is_paired() -> None:
    """Equal accuracies, but one pair errs on the same samples: there a small difference is no chance."""
    together = decided(1000, fecam=list(range(300)), slda=list(range(310)))
    apart = decided(1000, fecam=list(range(300)), slda=list(range(300, 610)))
    assert (together.name, apart.name) == ("fecam", "slda")
    assert together.rows[1].behind == apart.rows[1].behind == pytest.approx(0.01)
    assert together.rows[1].standard_error < 0.004 < 0.02 < apart.rows[1].standard_error


def test_a_single_held_out_sample() -> None:
    assert decided(1, slda=[0], ncm=[]).name == "ncm"
    choice = decided(1, slda=[], ncm=[])
    assert choice.sentence == "slda: 1.000 on 1 held-out training image; next ncm 1.000 (4.0 kB against 1.7 MB)"


def test_embeddings_with_nan_are_refused() -> None:
    with pytest.raises(InputError, match="NaN or infinity"):
        auto.choose(torch.full((4, 3), torch.nan), torch.tensor([0, 0, 1, 1]), Priors())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["learner.k=3"], "learner.name=auto compares learners with default settings, but learner.k is also set"),
        (["learner.k=3", "learner.strength=1"], "but learner.k, learner.strength are also set; remove the setting"),
        (["learner.name=atuo"], "unknown learner.name 'atuo'. Did you mean 'auto'? Known: slda, "),
        (["learner.name=[a, b]"], "unknown learner.name '['a', 'b']'"),
    ],
)
def test_refused_run_leaves_no_files(words: list[str], message: str, refused, tmp_path: Path) -> None:
    assert message in refused("train", *DIGITS, *QUICK, *words, f"run.out={tmp_path / 'runs'}", code=2)
    assert not (tmp_path / "runs").exists()


def test_no_learner_is_called_auto() -> None:
    assert AUTO not in LEARNERS
    wanted = r"^learner\.name=auto is only resolved by `ssd-edge train`.* choose a learner here: slda, "
    with pytest.raises(InputError, match=wanted):
        build({"name": AUTO}, 4, Priors())
    arrays, metadata = pack(build({"name": "ncm"}, 4, Priors()))
    with pytest.raises(BundleRefusedError, match=r"learner\.name=auto is only resolved by"):
        restore(arrays, {**metadata, "learner": AUTO})


def test_config_of_auto_is_a_working_file() -> None:
    done = CliRunner().invoke(config, ["--learner", "auto"], catch_exceptions=False)
    assert "train compares slda, ncm, ridge, ranpac, fecam with default settings on held-out" in done.output
    tree = parse(TrainConfig, yaml.safe_load(done.output))
    assert tree.learner == {"name": "auto"}
    assert auto.wanted(tree.learner)
    assert "; or auto" in CliRunner().invoke(config, [], catch_exceptions=False).output


def read(folder: Path, name: str) -> dict:
    return json.loads((folder / name).read_text())


@pytest.mark.usefixtures("quickly")
def test_a_run_keeps_the_choice_and_resumes_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words, folder, commit = [*DIGITS, *QUICK, f"run.out={tmp_path}"], tmp_path / "1", storage.ProgressStore.commit

    def interrupted(self: storage.ProgressStore, *args: object, **changes: object) -> None:
        commit(self, *args, **changes)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(storage.ProgressStore, "commit", interrupted)
        done = CliRunner().invoke(train, words)
    choice = read(folder, "run.json")["choice"]
    assert f"learner.name=auto takes {choice['sentence']}" in done.output.replace("\n", " ")
    assert done.exit_code != 0
    assert not (folder / "metrics.json").exists()

    monkeypatch.setattr(auto, "choose", None)  # called again, it would fail
    CliRunner().invoke(train, ["--resume", str(folder)], catch_exceptions=False)
    metrics, record = read(folder, "metrics.json"), read(folder, "run.json")
    assert metrics["choice"] == record["choice"] == choice
    assert metrics["learner"] == choice["name"] in auto.CANDIDATES
    assert {row["name"] for row in choice["rows"]} == set(auto.CANDIDATES)
    assert (choice["learned"], choice["held_out"]) == (40, 8)  # of 48 training images; none of the test images
    assert record["config"]["learner"] == {"name": choice["name"]}
    assert yaml.safe_load((folder / "config.yaml").read_text())["learner"] == {"name": choice["name"]}
    page = (folder / "report.html").read_text()
    assert f"Chosen by learner.name=auto: {choice['sentence']}. Candidates: " in page
    assert all(re.search(rf"\b{name} [\d.]+ % \([\d.]+ [kM]?B\)", page) for name in auto.CANDIDATES)


def test_a_run_of_another_than_the_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The chosen learner is trained, kept and exported exactly as if it had been named."""
    monkeypatch.setattr(auto, "DEFAULT", "ncm")
    monkeypatch.setattr(auto, "CANDIDATES", ("ncm", "ridge"))
    for words in (QUICK, ("learner.name=ncm", *QUICK[1:])):
        CliRunner().invoke(train, [*DIGITS, *words, f"run.out={tmp_path}"], catch_exceptions=False)
    chosen, named = finished.read(tmp_path / "1"), finished.read(tmp_path / "2")
    assert chosen.metrics["choice"]["name"] == chosen.metrics["learner"] == chosen.learner.name == "ncm"
    assert chosen.metrics["accuracy_matrix"] == named.metrics["accuracy_matrix"]
    assert "choice" not in named.metrics
    assert "learner.name=auto" not in (tmp_path / "2" / "report.html").read_text()
    for name in ("learner.safetensors", "statistics.safetensors", "config.yaml"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()


@pytest.mark.slow
def test_a_bundle_names_the_chosen_learner(cli, tmp_path: Path) -> None:
    cli("train", *DIGITS, *QUICK, f"run.out={tmp_path}")
    out = tmp_path / "auto.ssdedge"
    cli("deploy", "--target", "cpu", tmp_path / "1", "-o", out)
    manifest, choice = json.loads(cli("inspect", out, "--json").stdout), read(tmp_path / "1", "metrics.json")["choice"]
    assert manifest["learner"]["name"] == choice["name"]
    assert {row["name"] for row in choice["rows"]} == set(CANDIDATES)
