"""Ask why EWC with exact importances protects a ReLU MLP less than with those of SDMLP's code.

Usage: SSD_EDGE_DATA=FOLDER python benchmarks/fisher.py [--json FILE] [--orders N] [--epochs N] [CASE...]

A case is FISHER:BETA:WEIGHT[:CHANGE]. CHANGE is `zero` or `mean`: the importances of the outputs of classes that have
not been taught are set to 0, or to the mean of those that have; or `implicit`: the penalty is not a part of the clipped
gradient, but each step ends with the exact minimiser of the penalty and the squared distance from the point that the
step has reached, which is stable for any weight.

Split CIFAR-10 in 5 tasks, held-out training images; test images are not used. One thread.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from split import TASKS, accuracies, embeddings, protocol

from ssd_edge import learners
from ssd_edge.backbones.embedder import open_backbone
from ssd_edge.config import BackboneConfig
from ssd_edge.learners.gradient.finetune import FineTune, Settings
from ssd_edge.learners.priors import Priors
from ssd_edge.run import metrics
from ssd_edge.run.storage import environment

CASES = (
    *("batch:0.08:100", "batch:0.08:100:zero", "exact:0.08:10000", "exact:1:1000", "exact:1:1000:mean"),
    *("exact:1:10000", "exact:1:10000:implicit"),
)


class Implicit(FineTune):
    """A ReLU MLP whose penalty is applied after each step, in closed form."""

    def _step(self, *arguments: Any) -> dict[str, torch.Tensor]:
        weight, self.penalty.weight = self.penalty.weight, 0.0
        losses = super()._step(*arguments)
        self.penalty.weight = weight
        if self.penalty.active:
            with torch.no_grad():
                for name, parameter in self.parameters.items():
                    pull = 2 * self.settings.lr * weight
                    importance, anchored = self.penalty.importance[name], self.penalty.anchored[name]
                    parameter.copy_((parameter + pull * anchored) / (1 + pull * importance))
        return losses


def edit_untaught(learner: FineTune, change: str, taught: set[int]) -> None:
    """Replace the importances of outputs that are not in `taught`, which may grow, by 0 or the mean of the others."""
    original = learner.penalty._task_importance

    def edited(*arguments: Any) -> dict[str, torch.Tensor]:
        found = original(*arguments)
        for name in ("output_weight", "output_bias"):
            known = torch.tensor([row in taught for row in range(len(found[name]))])
            found[name][~known] = 0.0 if change == "zero" else found[name][known].mean(0)
        return found

    learner.penalty._task_importance = edited  # type: ignore[method-assign]


def run(case: str, order: int, epochs: int, vectors: torch.Tensor, labels: torch.Tensor) -> dict[str, Any]:
    """Train one case on the five tasks; return metrics and the shares of its first importances."""
    fisher, beta, weight, *change = case.split(":")
    train, held_out, row = protocol(labels, order)
    options = {
        "penalty": "ewc", "fisher": fisher, "epochs": epochs,
        "penalty_beta": float(beta), "penalty_weight": float(weight),
    }  # fmt: skip
    kind = Implicit if change == ["implicit"] else FineTune
    learner = kind(vectors.shape[1], Settings(**options), Priors(), order)
    learner.expect(10)
    taught: set[int] = set()
    if change and kind is FineTune:
        edit_untaught(learner, change[0], taught)
    matrix, stiff, untaught = [], 0.0, 0.0
    for task in range(TASKS):
        index = train[row[train] // 2 == task]
        taught |= set(row[index].tolist())
        learner.learn(learners.Task(vectors[index], row[index]))
        matrix.append(accuracies(learner, vectors[held_out], row[held_out], task))
        if not task:
            outputs = learner.penalty.importance["output_weight"].sum(1)
            untaught = float(outputs[2:].sum() / outputs.sum())
            steep = 2 * float(weight) * torch.cat([one.flatten() for one in learner.penalty.importance.values()])
            stiff = float((learner.settings.lr * steep > 2).double().mean())
    last = float((learner.predict(vectors[held_out]) // 2 == TASKS - 1).double().mean())
    summary = metrics.summary(matrix).to_dict()
    kept = {name: summary[name] for name in ("average_accuracy", "backward_transfer", "learning_accuracy")}
    return {
        "case": case,
        "order": order,
        **kept,
        "last_task_share": last,
        "stiff_share": stiff,
        "untaught_share": untaught,
    }


def main() -> None:
    """Print one line per case and order; write JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", default=CASES)
    parser.add_argument("--orders", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    vectors, labels = embeddings("cifar10-jpg.tar.xz", open_backbone(BackboneConfig(name="tiny"), torch.device("cpu")))
    rows: list[dict[str, Any]] = []
    for order in range(args.orders):
        for case in args.cases:
            rows.append(run(case, order, args.epochs, vectors, labels))
            now = rows[-1]
            print(
                f"{case:28} order {order}  accuracy {now['average_accuracy']:.3f}  "
                f"BWT {now['backward_transfer']:+.3f}  "
                f"just learned {now['learning_accuracy']:.3f}  last task {now['last_task_share']:.3f}  "
                f"stiff {now['stiff_share']:.5f}  untaught {now['untaught_share']:.3f}",
                flush=True,
            )
            if args.json:  # after every run, so that an interrupted one is not lost
                described = {"command": "python benchmarks/fisher.py", "epochs": args.epochs, **environment()}
                args.json.write_text(json.dumps({**described, "rows": rows}, indent=2) + "\n")
    for case in args.cases:
        found = [one["average_accuracy"] for one in rows if one["case"] == case]
        deviation = statistics.stdev(found) if len(found) > 1 else 0.0
        print(f"{case:28} {statistics.fmean(found):.3f} ± {deviation:.3f} ({len(found)})")


if __name__ == "__main__":
    main()
