"""What happens inside a sparse network: after each task, and during training where a cell asks for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ssd_edge.learners import Learner, Task
from ssd_edge.learners.gradient import representation
from ssd_edge.learners.gradient.distillation import count_activations, parse_top_n
from ssd_edge.learners.gradient.network import SDMLP
from ssd_edge.learners.gradient.sdmlp import SDMLPLearner
from ssd_edge.run.tasks import StreamData

TEMPERATURE = 8.0  # of Eq. 9 for a learner that has none of its own
TOP_SHARE = 10  # a learner without a Top-n table is looked at through the r/10 most frequent neurons


class Watch:
    """Looks at a learner from before a task to its end.

    Args:
        learner: an SDMLP or SSD.
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
        """Before a task: `former` are the Top-n neurons of the last one, or None."""
        self.task = task
        self.inputs = self.learner.prepared(task.embeddings)
        self.top = None if former is None else torch.tensor(former, dtype=torch.int64)
        self.teacher = self.learner.net.copy() if self.learner.tasks_learned else None
        self.before = None if self.teacher is None else self.teacher.logits(self.inputs)

    def counts(self) -> Tensor:
        """How many of the task's samples activate each neuron of the top layer now, ``(r,)``."""
        return count_activations(self.learner.net, self.inputs)[-1].cpu()

    def change(self) -> dict[str, float | None]:
        """Cosine of the teacher's Top-n keys with the student's, and Eq. 9 on the task's data; None in the first."""
        if self.teacher is None or self.top is None:
            return {"subnetwork_cosine": None, "teacher_divergence": None}
        net, top = self.learner.net, self.top.to(self.learner.device)
        logits = net.logits(self.inputs)
        known = self.before.shape[1]  # outputs that came since have no teacher
        divergence = representation.teacher_student_divergence(self.before, logits[:, :known], self.temperature)
        cosine = representation.subnetwork_cosine(self.teacher.keys, net.keys, top)
        return {"subnetwork_cosine": cosine, "teacher_divergence": divergence}

    def end(self, classes: int) -> tuple[dict[str, float | None], list[int]]:
        """After a task: what its neurons do on its data, and its Top-n neurons."""
        report = representation.neuron_report(self.learner.net, self.inputs, self.task.labels, classes)
        top = representation.top_k_set(self.counts(), self.n)
        shared = None if self.top is None else representation.jaccard(self.top, top)
        changed = {**self.change(), "top_n_jaccard": shared}
        return {**report, **changed}, top.tolist()

    def overall(self, prepared: StreamData) -> dict[str, float]:
        """What the neurons do on the training data of all tasks, in the end."""
        inputs = self.learner.prepared(prepared.train)
        return representation.neuron_report(self.learner.net, inputs, prepared.train_rows, len(prepared.names))

    def point(self, prepared: StreamData, number: int, epoch: int, former: Mapping[str, Any] | None) -> dict[str, Any]:
        """One point of a trace; accuracies are over all outputs, as the papers' are.

        Args:
            prepared: the stream.
            number: of the task.
            epoch: of it, from 1.
            former: the point before, or None.
        """
        learner = self.learner
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
            **self.change(),
        }


def watch(learner: Learner) -> Watch | None:
    """A `Watch` for a sparse network; None for any other learner."""
    return Watch(learner) if isinstance(learner, SDMLPLearner) else None
