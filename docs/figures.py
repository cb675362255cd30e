"""Regenerate the tables and figures of README.md and docs/ from docs/results/.

Usage: python docs/figures.py [--check]

Each result file records the command that wrote it. With --check nothing is written, and the exit code is 1 if a file
is out of date.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import statistics
import sys
from pathlib import Path

from adaptation_tables import adapt_table, tail_ends_table, tail_table
from fleet_tables import fleet_table, names_table

from ssd_edge import targets
from ssd_edge.learners import LEARNERS
from ssd_edge.report.compare import ranked
from ssd_edge.report.terminal import export_svg
from ssd_edge.report.wording import percent, points
from ssd_edge.reproduction.cells import Store
from ssd_edge.reproduction.rows import Row, mean, rows, spread
from ssd_edge.reproduction.specs import chosen
from ssd_edge.system import size

DOCS = Path(__file__).resolve().parent
README = DOCS.parent / "README.md"
ROWS = (*("precision", "shift", "budget", "epoch", "few", "readout", "mlp-ewc", "fisher"),)
# docs/what-matters.md: experiments of `ssd-edge reproduce` at the reduced budget on Split CIFAR-10
MATTERS = (
    *("shift", "k", "n", "lambda", "scope", "lr", "epochs", "gaba", "pretraining", "ewc", "layers"),
    *("controls", "panel"),
)
TERMS = {
    "cross_entropy": "cross-entropy",
    "logit_distillation": "logits",
    "hidden_distillation": "hidden",
}


def comparison_table(results: dict[str, dict]) -> str:
    """Return average accuracy after the last task of each method on each stream, and the size of its state."""
    lines = [
        "| average accuracy after the last task | " + " | ".join(results) + " | state |",
        "|---|" + "---|" * (len(results) + 1),
    ]
    known = {kind.display for kind in LEARNERS.values()} | {"joint"}
    names = [m.display for m in ranked(next(iter(results.values()))) if m.display in known]
    by_name = {data: {m.display: m for m in ranked(metrics)} for data, metrics in results.items()}
    for name in names:
        per_stream = [by_name[data][name].values for data in results]
        cells = [f"{100 * values['average_accuracy']:.1f} %" for values in per_stream]
        shown = f"**{name}**" if name == LEARNERS["slda"].display else name
        lines.append(f"| {shown} | {' | '.join(cells)} | {size(per_stream[0]['state_bytes'])} |")
    return "\n".join(lines)


def taught_table(found: dict) -> str:
    """Return the results of teaching new classes on a device, one at a time."""
    lines = [
        "| images of the new class | nearest to it | answered, not `unknown` | old classes, answered right | seconds |",
        "|---|---|---|---|---|",
    ]
    for row in found["taught"]:
        before, after = row["before"]["answered"], row["old_answered"]
        lines.append(
            f"| {row['images'] or 'all'} | {percent(row['new_nearest'])} | {percent(row['new_answered'])} | "
            f"{percent(before)} → {percent(after)} | {row['seconds']:.1f} |"
        )
    return "\n".join(lines)


def unknown_table(found: dict) -> str:
    """Return how well images of classes that were not taught are told from the known ones."""
    unseen = found["unseen"]
    lines = [
        "| | share |",
        "|---|---|",
        f"| AUROC against {len(found['new'])} classes of the same kind that were not taught | {unseen['auroc']:.3f} |",
        f"| known test images that are answered | {percent(unseen['known_answered'])} |",
        f"| images of untaught classes that are answered all the same | {percent(unseen['unseen_answered'])} |",
    ]
    for row in found["taught"]:
        share = percent(row["new_passes"])
        lines.append(
            f"| own test images that a class taught with {row['images'] or 'all its'} images accepts | {share} |"
        )
    return "\n".join(lines)


def bundles_table(found: dict) -> str:
    """Return size and speed of the bundle in each precision."""
    lines = ["| backbone | bundle | `deploy` | one image, from its file | peak memory |", "|---|---|---|---|---|"]
    for name, row in found["bundles"].items():
        if "refused" in row:
            lines.append(f"| {name} | refused by the precision gate | | | |")
            continue
        cells = f"{row['deploy_seconds']:.0f} s | {row['milliseconds']:.0f} ms | {row['peak_mb']:.0f} MiB"
        lines.append(f"| {name} | {size(row['bytes'])} | {cells} |")
    return "\n".join(lines)


def precision_table(rows: list[dict]) -> str:
    """Return the effect of each backbone precision."""
    lines = [
        "| | bundle | backbone | engine | smallest cosine | p99 of the difference | shift of a mean | "
        "same prediction | accuracy | one image |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        accuracy = row["accuracy"]
        cells = (
            row["precision"],
            "refused" if "refused" in row else size(row["bundle_bytes"]),
            size(row["backbone_bytes"]),
            size(row["engine_bytes"]),
            f"{row['min_cosine']:.6f}",
            f"{row['p99_difference']:.2g} σ",
            f"{row['drift']['mean_shift']:.2g} σ",
            f"{100 * row['agreement']:.2f} %",
            f"{100 * accuracy['reference']:.2f} % → {100 * accuracy['exported']:.2f} %",
            f"{row['milliseconds']:.1f} ms",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def distill_table(rows: list[dict]) -> str:
    """Return the accuracy of heads on students and on what they are compared with."""
    lines = [
        "| network | side | taught by | photographs | epochs | all classes | half A | half B | 5 images |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        trained = ["–", "", ""]
        if row["teachers"]:
            half = " of half A" if row["half_only"] else ""
            trained = [" + ".join(row["teachers"]), f"{row['photographs']:,}{half}", str(row["epochs"])]
        shares = [percent(row[key]) for key in ("accuracy", "half", "other", "five")]
        levels = " without levels" if row["features"] == 256 else ""
        lines.append(f"| {row['student']}{levels} | {row['size']} | {' | '.join([*trained, *shares])} |")
    return "\n".join(lines)


def backbones_table(rows: list[dict]) -> str:
    """Return which networks were exported and built."""
    lines = [
        "| name | side | features | levels | ONNX file | largest difference to PyTorch | TensorRT-RTX engine |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        engine = f"{row['engine_megabytes']} MB" if "engine_megabytes" in row else f"refused: {row['refused']}"
        difference = "–" if row["difference"] is None else f"{row['difference']:.0e} of a deviation"
        lines.append(
            f"| `{row['name']}` | {row['size']} | {row['features']:,} | {row['levels']} | {row['megabytes']} MB | "
            f"{difference} | {engine} |"
        )
    return "\n".join(lines)


def calibration_table(results: list[dict]) -> str:
    """Return the calibration error of scores, by data set and number of taught classes."""
    lines = [
        "| data, learner | images of each taught class | taught | softmax without T | all answers (floor) | "
        "not `unknown` | answers of the bundle (floor) | taught answers (floor) |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for one in results:
        for shots, found in one["images"].items():
            for taught, errors in found["taught"].items():
                parts = [errors[name] for name in ("all", "answered", "answers of the bundle", "answers taught")]
                shown = [
                    "–" if part is None else f"{points(part['ece'])}" + (f" ({points(part['floor'])})" if floor else "")
                    for part, floor in zip(parts, (True, False, True, True), strict=True)
                ]
                count = "all" if shots == "1000" else shots
                cells = (
                    f"{one['data']}, `{one['learner']}`",
                    count,
                    taught,
                    points(errors["softmax of scores"]),
                    *shown,
                )
                if taught != "0" or shots == next(iter(one["images"])):
                    lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def guard_table(results: list[dict]) -> str:
    """Compare the guard's estimates with the truth, by data set and learner."""
    lines = [
        "| data, features | learner | learns accepted | error of the accuracy: mean, worst | cannot be estimated | "
        "loss underestimated by at most | lost by a series, at most | new class accepted after 5, 20, 100 images |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for one in results:
        for name, found in one["learners"].items():
            accepted = sum(found["accepted"].values())
            errors = [found[f"level_error_{which}"] for which in ("mean", "worst")]
            passes = [found["new_class_passes"].get(f"new, {count}") for count in (5, 20, 100)]
            cells = (
                f"{one['data']}, {one['features']:,}",
                f"`{name}`",
                f"{accepted} of {found['learns']}",
                "–" if None in errors else " / ".join(map(points, errors)) + " points",
                f"{found['cannot_be_estimated']} of {accepted}",
                "–"
                if found["drop_underestimated_most"] is None
                else f"{points(found['drop_underestimated_most'])} points",
                f"{points(max(found['lost_by_series']))} points",
                " / ".join("–" if share is None else percent(share[0]) for share in passes),
            )
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def privacy_tables(results: dict) -> dict[str, str]:
    """Return what can be recovered from two neighbouring generations, and from one."""
    counts = list(results["two"][0]["cosine"])
    lines = [
        "| stored as | "
        + " | ".join(
            f"cosine to the true embedding, k = {count}" if count == "1" else f"k = {count}" for count in counts
        )
        + " | membership, errors | accuracy |",
        "|---|" + "---|" * (len(counts) + 2),
    ]
    for row in results["two"]:
        name = f"{row['kind']}, noise {row['noise']:g}" if row["noise"] else row["kind"]
        cells = [f"{row['cosine'][count]:.3f}" for count in counts]
        lines.append(
            f"| {name} | {' | '.join(cells)} | {percent(row['membership']['error'])} | {percent(row['accuracy'])} |"
        )
    one = [
        "| features | classes | images of each | all images | AUROC | with `learner.per_class=true` |",
        "|---|---|---|---|---|---|",
    ]
    for row in results["one"]:
        separate = f"{row['auroc_per_class']:.2f}" if "auroc_per_class" in row else "–"
        images = row["images"] or "all but ten"
        cells = (f"{row['features']:,}", row["classes"], images, f"{row['total']:,}", f"{row['auroc']:.2f}", separate)
        one.append(f"| {' | '.join(map(str, cells))} |")
    return {"privacy-two": "\n".join(lines), "privacy-one": "\n".join(one)}


def readers_table(results: dict) -> str:
    """Return prediction latency during learning and the number of wrong predictions; medians over rounds."""
    lines = ["| | predictions | p50 | p99 | slowest | wrong or failed | other work |", "|---" * 7 + "|"]
    where = {"thread": "a thread of the same process", "process": "processes of their own"}
    for row in results["rows"]:
        for name, title in (("without", "no learn"), ("learning", f"{results['learns']} learns")):
            rounds = [one[name] for one in row["rounds"]]
            p50, p99, slowest = (statistics.median(one[key] for one in rounds) for key in ("p50", "p99", "max"))
            ratio = f" ({row['ratio']:.1f}×)" if name == "learning" else ""
            bad = sum(one["wrong"] + len(one["failures"]) for one in rounds)
            title = f"{title}, {where[row['learner']]}" if name == "learning" else title
            cells = (f"{sum(one['answers'] for one in rounds):,}", f"{p50:.1f} ms", f"{p99:.1f} ms{ratio}")
            others = f"{statistics.median(one['company'] for one in rounds):.1f} cores"
            lines.append(f"| {title} | {' | '.join(cells)} | {slowest:.0f} ms | {bad} | {others} |")
    return "\n".join(lines)


def start_table(found: dict) -> str:
    """Return what verbs of a device take from the start of a process to its end."""
    lines = ["| verb | PyTorch | seconds | of a processor | peak memory |", "|---|---|---|---|---|"]
    for row in found["rows"]:
        needed = "needed" if row["torch"] else "out of reach"
        cells = f"{row['seconds']:.2f} | {row['cpu']:.2f} | {row['peak_bytes'] / 2**20:.0f} MiB"
        lines.append(f"| `{row['verb']}` | {needed} | {cells} |")
    return "\n".join(lines)


def targets_table() -> str:
    """Return the table of targets from their files."""
    lines = ["| target | | TensorRT | precisions, fastest first | default | memory |", "|---|---|---|---|---|---|"]
    for target in targets.targets().values():
        names = ", ".join(f"`{name}`" for name in (target.name, *target.aliases))
        versions = "–" if target.tensorrt is None else " to ".join(filter(None, target.tensorrt))
        lines.append(
            f"| {names} | {target.title} | {versions} | {', '.join(target.precisions)} | {target.default_precision} | "
            f"{target.memory_mb / 1024:g} GiB |"
        )
    return "\n".join(lines)


def settings_table(rows: list[dict]) -> str:
    """Return the accuracy of gradient-trained learners by setting."""
    lines = [
        "| setting | accuracy | backward transfer | just learned |",
        "|---|---|---|---|",
    ]
    for row in rows:
        name, _, settings = row["settings"].removeprefix("name=").partition(",")
        settings = ", ".join(part for part in settings.split(",") if not part.startswith("keys_shift"))
        lines.append(
            f"| `{name}` {settings} | {row['average_accuracy']:.3f} | {row['backward_transfer']:+.3f} | "
            f"{row['learning_accuracy']:.3f} |"
        )
    return "\n".join(lines)


FISHER_CASES = {"exact": "exact", "batch": "SDMLP's code"}
FISHER_CHANGES = {
    "zero": ", none for outputs not taught",
    "mean": ", the mean for outputs not taught",
    "implicit": ", implicit step",
}


def fisher_table(rows: list[dict]) -> str:
    """Return what EWC's importances achieve for a ReLU MLP, by their kind, temperature and weight."""
    lines = [
        "| importances | β | weight | accuracy | BWT | just learned | answers with a class of the last task "
        "| share of the outputs' importance on outputs not taught, after task 1 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    cases = list(dict.fromkeys(row["case"] for row in rows))
    common = set.intersection(*({row["order"] for row in rows if row["case"] == case} for case in cases))
    for case in cases:
        found = [row for row in rows if row["case"] == case and row["order"] in common]
        mean = {key: statistics.fmean(row[key] for row in found) for key in found[0] if key not in ("case", "order")}
        spread = f" ± {points(statistics.stdev(row['average_accuracy'] for row in found))}" if len(found) > 1 else ""
        fisher, beta, weight, *change = case.split(":")
        lines.append(
            f"| {FISHER_CASES[fisher]}{FISHER_CHANGES[change[0]] if change else ''} | {beta} | {int(weight):,} | "
            f"{points(mean['average_accuracy'])} %{spread} ({len(found)}) | "
            f"{points(mean['backward_transfer'], signed=True)} | {percent(mean['learning_accuracy'])} | "
            f"{percent(mean['last_task_share'])} | {percent(mean['untaught_share'])} |"
        )
    return "\n".join(lines)


def heads_table(runs: list[dict]) -> str:
    """Return the accuracy of each head with few and many images, for each set of levels."""
    lines = []
    for run in runs:
        names = list(run["heads"][0]["accuracy"])
        shown = [LEARNERS[name].display for name in names]
        lines += [f"| {run['data'].split('.')[0]}, {sum(run['widths']):,} features | {' | '.join(shown)} |"]
        lines += ["|---" * (len(names) + 1) + "|"]
        for row in run["heads"]:
            means = {name: statistics.fmean(values) for name, values in row["accuracy"].items()}
            best = max(means.values())
            cells = [f"**{percent(mean)}**" if mean == best else percent(mean) for mean in means.values()]
            lines.append(f"| {row['images'] or 'all'} images a class | {' | '.join(cells)} |")
        sizes = [size(run["heads"][-1]["state_bytes"][name]) for name in names]
        lines += [f"| state with all images | {' | '.join(sizes)} |", ""]
    return "\n".join(lines).rstrip()


def views_table(runs: list[dict]) -> str:
    """Return what a second view of each image is worth, by data set and number of images."""
    counts = [row["images"] for row in runs[0]["rows"]]
    lines = [
        f"| images a class | {' | '.join(str(count or 'all') for count in counts)} |",
        "|---" * (len(counts) + 1) + "|",
    ]
    for run in runs:
        cells = []
        for row in run["rows"]:
            one, two = (statistics.fmean(row[name]) for name in ("one", "two"))
            cells.append(f"{percent(one)}, {100 * (two - one):+.1f}")
        limit = ", 50 images a class at most" if "--per-class 50" in run["command"] else ""
        lines.append(f"| {run['data'].split('.')[0]}, {run['backbone']}{limit} | {' | '.join(cells)} |")
    return "\n".join(lines)


def views_beside_table(run: dict) -> str:
    """Return accuracy on classes of few images and on the others, without and with second views of each image."""
    lines = ["| images of one class in five | these classes | the others |", "|---|---|---|"]
    for row in run["beside"]:
        cells = []
        for kind in ("few", "others"):
            one, two = (statistics.fmean(row[f"{name}_{kind}"]) for name in ("one", "two"))
            cells.append(f"{percent(one)}, {100 * (two - one):+.1f}")
        lines.append(f"| {row['images']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def curve_table(rows: list[dict]) -> str:
    """Return accuracy with few images of each class, by number of features."""
    shown = (1, 3, 5, 10, 20, 30)
    lines = [
        f"| features | {' | '.join(f'{count} images' if count > 1 else '1 image' for count in shown)} | least step |"
    ]
    lines.append("|---" * (len(shown) + 2) + "|")
    for row in rows:
        by_count = dict(zip(row["images"], row["accuracy"], strict=True))
        cells = " | ".join(percent(by_count[count]) for count in shown)
        lines.append(f"| {row['features']:,} | {cells} | {points(row['least_step'], signed=True)} |")
    return "\n".join(lines)


def beside_table(rows: list[dict]) -> str:
    """Return how well a class of few images is recognised beside all images of the others."""
    lines = ["| images of one class | recognised | with all of its images | the others lose |", "|---|---|---|---|"]
    for row in rows:
        cells = f"{percent(row['with_few'])} | {percent(row['with_all'])} | {points(row['others_lose'])}"
        lines.append(f"| {row['images']} | {cells} |")
    return "\n".join(lines)


def epoch_table(rows: list[dict]) -> str:
    """Return the time of one epoch in three implementations, and the speed-up over a whole task."""
    lines = [
        "| neurons | threads | dense autograd | touched rows | compiled | compiled, second half | whole task |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        one = (1, row["seconds"], _milliseconds(row["second_half"]), row["ratio"])
        every = (row["threads"], row["seconds_all_threads"], "", row["ratio_all_threads"])
        for threads, seconds, late, ratio in (one, every):
            cells = " | ".join(_milliseconds(seconds[name]["median"]) for name in ("dense", "touched", "compiled"))
            lines.append(f"| {row['neurons']:,} | {threads} | {cells} | {late} | {ratio:.1f}× |")
    return "\n".join(lines)


def growth_table(curve: list[dict]) -> str:
    """Return the time of a compiled epoch by network size."""
    lines = [
        "| neurons | first epoch | second half | scores alone | ratio | neurons evaluated for every sample |",
        "|---|---|---|---|---|---|",
    ]
    for row in curve:
        cells = " | ".join(_milliseconds(row[name]) for name in ("first_epoch", "second_half", "scores"))
        share = row["second_half"] / row["scores"]
        lines.append(f"| {row['neurons']:,} | {cells} | {share:.2f} | {row['evaluated']:,} |")
    return "\n".join(lines)


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:,.0f} ms"


def stored(experiment: str) -> list[Row]:
    """Return the stored rows of an experiment on Split CIFAR-10, restricted to the class orders they have in common."""
    (one,) = chosen([experiment])
    found = [row for row in rows(one, "cifar10", "reduced", Store(DOCS / "results" / "reproduce")) if row.results]
    common = set.intersection(*(set(row.results) for row in found)) if found else set()
    return [dataclasses.replace(row, results={order: row.results[order] for order in sorted(common)}) for row in found]


def matters_table(experiment: str) -> str:
    """Return the effect of a setting on accuracy, forgetting, plasticity and bias towards the last task."""
    lines = ["| | accuracy | BWT | just learned | answers with a class of the last task |", "|---|---|---|---|---|"]
    for row in stored(experiment):
        accuracies, deviation = row.values("accuracy"), spread(row.values("accuracy"))
        beside = f" ± {points(deviation)}" if deviation is not None else ""
        accuracy = f"{percent(mean(accuracies))}{beside} ({len(accuracies)})"
        transfer = points(mean(row.values("backward_transfer")), signed=True)
        learned, last = (percent(mean(row.values(name))) for name in ("learning_accuracy", "last_task_share"))
        lines.append(f"| {row.system.name} | {accuracy} | {transfer} | {learned} | {last} |")
    return "\n".join(lines)


def readout_table(results: list[dict]) -> str:
    """Compare closed-form heads on the keys with the trained head."""
    lines = ["| | trained head | closed-form head, same keys | closed-form head, first keys |", "|---|---|---|---|"]
    for row in results:
        cells = " | ".join(percent(row[name]) for name in ("own_head", "closed_form_head", "keys_before"))
        lines.append(f"| {row['system']} | {cells} |")
    return "\n".join(lines)


def pulls_table() -> str:
    """Return the gradient norm of each weighted term of the SSD loss in the first and last epoch of a task."""
    head = [f"{title}, {when} epoch" for title in TERMS.values() for when in ("first", "last")]
    lines = ["| | " + " | ".join(head) + " |", "|---" * (len(head) + 1) + "|"]
    for row in stored("lambda"):
        cells = []
        for key in (f"{name}_gradient_{when}" for name in TERMS for when in ("first", "last")):
            # the first task has no teacher
            recorded = [value for one in row.results.values() for value in one["measured"].get(key, [])[1:]]
            values = [value for value in recorded if value is not None]
            cells.append(f"{mean(values):.2g}" if values else "–")
        lines.append(f"| {row.system.name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def filled(text: str, name: str, content: str) -> str:
    """Return `text` with the content between the markers of `name` replaced."""
    pattern = rf"(<!-- figures:{name} -->\n).*?(<!-- /figures:{name} -->)"
    return re.sub(pattern, lambda match: match[1] + content + "\n" + match[2], text, flags=re.DOTALL)


def few_table(rows: list[dict]) -> str:
    """Return accuracy of a class taught by few images, and what the old ones lose, by schedule."""
    counts = list(dict.fromkeys(row["images"] for row in rows))
    lines = [
        f"| steps | {' | '.join(f'{count} images: new, old' for count in counts)} |",
        "|---" * (len(counts) + 1) + "|",
    ]
    for schedule in dict.fromkeys(row["schedule"] for row in rows):
        by_count = {row["images"]: row for row in rows if row["schedule"] == schedule}
        cells = []
        for count in counts:
            row = by_count[count]
            lost = f"{points(-row['old_loses'], signed=True)} ({points(-row['old_loses_most'], signed=True)})"
            cells.append(f"{percent(row['new'])} ({percent(row['new_least'])}), {lost}")
        lines.append(f"| {schedule} | {' | '.join(cells)} |")
    return "\n".join(lines)


def variants_table(rows: list[dict]) -> str:
    """Return means over class orders, the worst accuracy, the neurons that a task changes, and memory for targets."""
    orders = len({row["order"] for row in rows})
    lines = [
        f"| {orders} class orders | accuracy (worst) | BWT | just learned | neurons changed | targets: task, between |",
        "|---|---|---|---|---|---|",
    ]
    for name in dict.fromkeys(row["variant"] for row in rows):
        ones = [row for row in rows if row["variant"] == name]
        means = {key: mean([row[key] for row in ones]) for key in ("average_accuracy", "backward_transfer")}
        worst = min(row["average_accuracy"] for row in ones)
        learned, changed = (percent(mean([row[key] for row in ones])) for key in ("learning_accuracy", "changed"))
        held = [size(ones[0][key]) if ones[0][key] else "–" for key in ("bytes_during", "bytes_between")]
        lines.append(
            f"| {name} | {percent(means['average_accuracy'])} ({percent(worst)}) | "
            f"{points(means['backward_transfer'], signed=True)} | {learned} | {changed} | {', '.join(held)} |"
        )
    return "\n".join(lines)


def drift_table(results: dict) -> str:
    """Return the output of the drift monitor for changed images, by their number."""
    counts = next(iter(results["shifts"].values()))["images"]
    heads = [f"after {int(count):,}" for count in counts]
    lines = [f"| change | {' | '.join(heads)} | directions alone, from the start | `unknown` |"]
    lines.append("|---" * (len(heads) + 3) + "|")
    for name, row in results["shifts"].items():
        cells, alone = [], None
        for count in counts:
            one = row["images"].get(count)
            if one is None:
                cells.append("–")
                continue
            level, share = max(one["levels"].items(), key=lambda item: item[1])
            cells.append(f"{one['psi']:.2f} {level}" + (f" ({percent(share)})" if share < 1 else ""))
            alone = one["psi_directions_from_start"]  # after the most images
        shown = "–" if alone is None else f"{alone:.2f}"
        lines.append(f"| {name} | {' | '.join(cells)} | {shown} | {percent(row['unknown'])} |")
    return "\n".join(lines)


def alarms_table(results: dict) -> str:
    """Return how often unchanged images are classified as moderate or drifted."""
    lines = ["| unchanged images | compared with | moderate | drifted | mean, largest index |", "|---|---|---|---|---|"]
    kinds = {"from_start": "the bundle", "after_first_window": "the bundle and the first 1,000"}
    for count, by_kind in results["false_alarms"].items():
        for kind, one in by_kind.items():
            alarms = " | ".join(f"{100 * one[level]:.2f} %" for level in ("moderate", "drifted"))
            most = [one[key] for key in ("mean_psi", "largest_psi")]
            indices = "no figure yet" if None in most else ", ".join(f"{index:.3f}" for index in most)
            lines.append(f"| {int(count):,} | {kinds[kind]} | {alarms} | {indices} |")
    return "\n".join(lines)


def serve_table(results: dict) -> str:
    """Return how long requests to the service take, alone and beside learns."""
    rows = [(f"one client: {name}", results["latency"][name]) for name in ("embedder", "service", "peer")]
    rows += [(f"eight clients, {name}", results["load"][name]) for name in ("alone", "beside learns")]
    lines = ["| | median | 99 % within | answers per second |", "|---|---|---|---|"]
    for name, one in rows:
        rate = one.get("per_second", "")
        lines.append(f"| {name} | {one['p50']:.1f} ms | {one['p99']:.0f} ms | {rate} |")
    return "\n".join(lines)


def arm64_tables(results: dict) -> dict[str, str]:
    """Return how an emulated ARM64 machine answers, and the installed size of what a device needs."""
    lines = ["| after | same answers | scores within | margins within |", "|---|---|---|---|"]
    for step, row in results["steps"].items():
        lines.append(f"| {step} | {row['same']} of {row['answers']} | {row['score']:.1e} | {row['margin']:.1e} |")
    times = ["| verb | x86-64 | ARM64, emulated |", "|---|---|---|"]
    first = {row["verb"]: row for row in reversed(results["verbs"])}
    for verb in dict.fromkeys(row["verb"] for row in results["verbs"]):
        times.append(f"| `{verb}` | {first[verb]['x86_64'][1]:.1f} s | {first[verb]['arm64'][1]:.0f} s |")
    predict, torch = (results["sizes"][name] for name in ("predict", "torch"))
    sizes = ["| installed, without compiled Python | x86-64 | ARM64 |", "|---|---|---|"]
    for name, parts in (("predicts: `[predict]`", [predict]), ("learns: with PyTorch for the CPU", [predict, torch])):
        cells = (size(sum(part[machine] for part in parts)) for machine in ("x86_64", "arm64"))
        sizes.append(f"| {name} | {' | '.join(cells)} |")
    return {"arm64": "\n".join(lines), "arm64-times": "\n".join(times), "sizes": "\n".join(sizes)}


def main() -> None:
    """Write the figures and tables, or check that they are up to date."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    results = {
        "groceries, 50 classes": json.loads((DOCS / "results" / "grocery50.json").read_text()),
    }
    drift = json.loads((DOCS / "results" / "drift.json").read_text())
    photos = json.loads((DOCS / "results" / "photos.json").read_text())
    heads = json.loads((DOCS / "results" / "heads.json").read_text())
    views = json.loads((DOCS / "results" / "views.json").read_text())
    tails = json.loads((DOCS / "results" / "tail.json").read_text())["rows"]
    fleet = json.loads((DOCS / "results" / "fleet.json").read_text())
    names = json.loads((DOCS / "results" / "fleet-names.json").read_text())
    read = {name: json.loads((DOCS / "results" / f"{name}.json").read_text())["rows"] for name in ROWS}
    tables = {
        README: {"taught": taught_table(photos)},
        DOCS / "learners.md": {"table": comparison_table(results)},
        DOCS / "backbone.md": {
            "backbones": backbones_table(json.loads((DOCS / "results" / "backbones.json").read_text())["rows"])
        },
        DOCS / "own-backbone.md": {
            "distill": distill_table(json.loads((DOCS / "results" / "distill.json").read_text())["rows"])
        },
        DOCS / "deploy.md": {"targets": targets_table(), "precision": precision_table(read["precision"])},
        DOCS / "device.md": {
            "unknown": unknown_table(photos),
            "calibration": calibration_table(json.loads((DOCS / "results" / "calibration.json").read_text())),
            "guard": guard_table(json.loads((DOCS / "results" / "guard.json").read_text())),
            "bundles": bundles_table(photos),
            "start": start_table(json.loads((DOCS / "results" / "start.json").read_text())),
            "readers": readers_table(json.loads((DOCS / "results" / "readers.json").read_text())),
            **arm64_tables(json.loads((DOCS / "results" / "arm64.json").read_text())),
        },
        DOCS / "slda.md": {
            "heads": heads_table(heads),
            "curve": curve_table(heads[0]["curve"]),
            "beside": beside_table(heads[0]["beside"]),
            "views": views_table(views),
            "views-beside": views_beside_table(views[0]),
        },
        DOCS / "adaptation.md": {
            "adapt": adapt_table(json.loads((DOCS / "results" / "adapt.json").read_text())["rows"]),
            "tail": tail_table(tails),
            "tail-ends": tail_ends_table(tails),
        },
        DOCS / "fleet.md": {
            "fleet": fleet_table(fleet),
            "names": names_table({one["settings"]["data"]: one["names"] for one in (names, fleet)}),
        },
        DOCS / "serve.md": {"serve": serve_table(json.loads((DOCS / "results" / "serve.json").read_text()))},
        DOCS / "service.md": {"drift": drift_table(drift), "drift-alarms": alarms_table(drift)},
        DOCS / "method.md": {
            "shift": settings_table(read["shift"]),
            "budget": settings_table(read["budget"]),
            "few": few_table(read["few"]),
            "few-test": few_table(json.loads((DOCS / "results" / "few.json").read_text())["test"]),
            "variants": variants_table(json.loads((DOCS / "results" / "variants.json").read_text())["rows"]),
        },
        DOCS / "speed.md": {
            "epoch": epoch_table(read["epoch"]),
            "growth": growth_table(json.loads((DOCS / "results" / "epoch.json").read_text())["curve"]),
        },
        DOCS / "privacy.md": privacy_tables(json.loads((DOCS / "results" / "privacy.json").read_text())),
        DOCS / "what-matters.md": {
            **{name: matters_table(name) for name in MATTERS},
            "pulls": pulls_table(),
            "readout": readout_table(read["readout"]),
            "mlp-ewc": settings_table(read["mlp-ewc"]),
            "fisher": fisher_table(read["fisher"]),
        },
    }
    stale = []
    for path, filling in tables.items():
        old = new = path.read_text(encoding="utf-8")
        for name, content in filling.items():
            new = filled(new, name, content)
        if new != old:
            stale.append(path.name)
        if not check:
            path.write_text(new, encoding="utf-8")
    if check:
        sys.exit(f"{', '.join(stale)}: stale; run python docs/figures.py" if stale else 0)
    export_svg(next(iter(results.values())), DOCS / "train.svg")


if __name__ == "__main__":
    main()
