"""Statistics of a sparse network after each task and, for traced cells, during training."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ssd_edge.learners import Learner, Task
from ssd_edge.learners.gradient import representation
from ssd_edge.learners.gradient.distillation import count_activations, parse_top_n
from ssd_edge.learners.gradient.network import SDMLP
from ssd_edge.learners.gradient.sdmlp import SDMLPLearner
from ssd_edge.reproduction.cells import TracePoint
from ssd_edge.run.tasks import StreamData

TEMPERATURE = 8.0  # temperature of Eq. 9 for learners without one
TOP_SHARE = 10  # for learners without a Top-n table, n = r/10


class Watch:
    """Observer of a learner during a task.

    Args:
        learner: An SDMLP or SSD learner.
    """

    def __init__(self, learner: SDMLPLearner) -> None:
        self.learner = learner
        settings = learner.settings
        wanted = getattr(settings, "top_n", None)
        neurons = settings.neurons
        self.n = max(settings.k, neurons // TOP_SHARE) if wanted is None else parse_top_n(wanted, settings.k, neurons)
        self.temperature = getattr(settings, "temperature", TEMPERATURE)
        self.teacher: SDMLP | None = None

    def begin(self, task: Task, former: Sequence[int] | None) -> None:
        """Prepare for a task; `former` are the Top-n neurons of the previous task, or None."""
        self.task = task
        self.inputs = self.learner.prepared(task.embeddings)
        self.top = None if former is None else torch.tensor(former, dtype=torch.int64)
        self.teacher = self.learner.net.copy() if self.learner.tasks_learned else None
        self.before = None if self.teacher is None else self.teacher.logits(self.inputs)

    def counts(self) -> Tensor:
        """Return the number of samples of the task that activate each neuron of the top layer, ``(r,)``."""
        return count_activations(self.learner.net, self.inputs)[-1].cpu()

    def change(self) -> dict[str, float | None]:
        """Return the cosine of the Top-n keys of teacher and student and Eq. 9 on the task; None in the first task."""
        if self.teacher is None or self.before is None or self.top is None:
            return {"subnetwork_cosine": None, "teacher_divergence": None}
        net, top = self.learner.net, self.top.to(self.learner.device)
        logits = net.logits(self.inputs)
        known = self.before.shape[1]  # outputs added since have no teacher
        divergence = representation.teacher_student_divergence(self.before, logits[:, :known], self.temperature)
        cosine = representation.subnetwork_cosine(self.teacher.keys, net.keys, top)
        return {"subnetwork_cosine": cosine, "teacher_divergence": divergence}

    def end(self, classes: int) -> tuple[dict[str, float | None], list[int]]:
        """Return statistics of the neurons on the data of the task, and its Top-n neurons."""
        report = representation.neuron_report(self.learner.net, self.inputs, self.task.labels, classes)
        top = representation.top_k_set(self.counts(), self.n)
        shared = None if self.top is None else representation.jaccard(self.top, top)
        changed = {**self.change(), "top_n_jaccard": shared}
        return {**report, **changed}, top.tolist()

    def overall(self, prepared: StreamData) -> dict[str, float]:
        """Return statistics of the neurons on the training data of all tasks."""
        inputs = self.learner.prepared(prepared.train)
        return representation.neuron_report(self.learner.net, inputs, prepared.train_rows, len(prepared.names))

    def point(self, prepared: StreamData, number: int, epoch: int, former: TracePoint | None) -> TracePoint:
        """Return one point of a trace; accuracies are over all outputs, as in the papers.

        Args:
            prepared: Data of the stream.
            number: Index of the task.
            epoch: Epoch of the task, from 1.
            former: Previous point, or None.
        """
        learner = self.learner
        change = self.change()
        answers = learner.scores(self.task.embeddings).argmax(1)
        tested = learner.scores(prepared.test).argmax(1) == prepared.test_rows
        frequent = representation.top_k_set(self.counts(), learner.settings.k)
        shared = None if former is None else representation.jaccard(torch.tensor(former["top"]), frequent)
        return {
            "task": number,
            "epoch": epoch,
            "train_accuracy": float((answers == self.task.labels).double().mean()),
            "test_accuracy": [float(tested[index].double().mean()) for index in prepared.test_tasks],
            "top": frequent.tolist(),
            "jaccard": shared,
            "subnetwork_cosine": change["subnetwork_cosine"],
            "teacher_divergence": change["teacher_divergence"],
        }


def watch(learner: Learner) -> Watch | None:
    """Return a `Watch` for a sparse network, or None for other learners."""
    return Watch(learner) if isinstance(learner, SDMLPLearner) else None
