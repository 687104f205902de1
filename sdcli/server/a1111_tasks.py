"""The jobs of AUTOMATIC1111's dialect by their task ids, and how far they are. Its progress is not about one job by
nature: without a task id a client gets its own running job, or else the numbers of someone else's, without its id and
image. An id means something to its own client alone, so that nobody can find, end or replace the task of another one.
"""

from __future__ import annotations

import base64
import time
from collections import OrderedDict
from dataclasses import dataclass

from sdcli.server.a1111_models import ProgressAnswer, State, TaskProgress, TaskQuestion
from sdcli.server.engine import Engine
from sdcli.server.jobs import Job

MAX_TASKS = 1000
"""ImageTask ids that are remembered."""


@dataclass(eq=False)
class ImageTask:
    """A call of txt2img or img2img."""

    id: str
    kind: str
    job: Job
    batch_size: int
    skipped: bool = False
    interrupted: bool = False

    @property
    def iterations(self) -> int:
        return -(-len(self.job.images) // self.batch_size)


class Tasks:
    """The tasks of a server by client and id, the newest last."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._tasks: OrderedDict[tuple[str, str], ImageTask] = OrderedDict()

    def add(self, task: ImageTask) -> None:
        key = task.job.client, task.id
        self._tasks[key] = task
        self._tasks.move_to_end(key)
        while len(self._tasks) > MAX_TASKS:
            self._tasks.popitem(last=False)

    def find(self, client: str, id: str) -> ImageTask | None:
        """The task of a client, or None where this client has none of that id."""
        return self._tasks.get((client, id))

    def waiting(self, client: str) -> list[ImageTask]:
        """The waiting tasks of a client."""
        return [task for task in self._tasks.values() if task.job.state == "queued" and task.job.client == client]

    def running(self, client: str) -> list[ImageTask]:
        """The running tasks of a client."""
        return [task for task in self._tasks.values() if task.job.state == "running" and task.job.client == client]

    def interrupt(self, client: str, id: str | None) -> None:
        """Cancel the running jobs of a client, or one by its id."""
        for task in self._chosen(client, id):
            task.interrupted = True
            self._engine.cancel(task.job, why="interrupted")

    def skip(self, client: str, id: str | None) -> None:
        """Cancel the images that are generated now; the next ones of the same jobs follow."""
        for task in self._chosen(client, id):
            events = (event["images"] for event in reversed(task.job.events) if event and "images" in event)
            task.skipped = True
            self._engine.cancel(task.job, frozenset(next(events, [0])), why="skipped")

    def _chosen(self, client: str, id: str | None) -> list[ImageTask]:
        named = None if id is None else self.find(client, id)
        return self.running(client) if id is None else [named] if named is not None and not named.job.over else []

    def progress(self, client: str, id: str | None, *, with_image: bool) -> ProgressAnswer:
        """How far a task is: the one with the id, else one of the client, else that of anyone; else idle."""
        if id is not None:
            named = self.find(client, id)
            return ProgressAnswer() if named is None or named.job.over else self._progress(named, with_image)
        own = [*self.running(client), *self.waiting(client)]
        if own:
            return self._progress(own[0], with_image)
        others = [task for task in self._tasks.values() if task.job.state == "running"]
        if others:
            return _nameless(self._progress(others[0], False))
        return ProgressAnswer()

    def _progress(self, task: ImageTask, with_image: bool) -> ProgressAnswer:
        job = task.job
        steps = (event for event in reversed(job.events) if event and event["type"] == "step")
        step = next(steps, {"step": 0, "steps": 0})
        if not step["steps"]:
            step = {"step": 0, "steps": job.images[0].request.steps}
        finished = len(job.done) + len(job.failed)
        state = State(
            skipped=task.skipped,
            interrupted=task.interrupted,
            job=task.id,
            job_count=task.iterations,
            job_timestamp=timestamp(job),
            job_no=min(finished // task.batch_size, task.iterations - 1),
            sampling_step=step["step"],
            sampling_steps=step["steps"],
        )
        place = self._engine.place(job)
        return ProgressAnswer(
            progress=round(job.progress, 4),
            eta_relative=job.seconds_left or 0.0,
            state=state,
            current_image=preview_of(job) if with_image else None,
            textinfo=None if place is None else f"waiting, place {place} in the queue",
        )

    def task_progress(self, client: str, question: TaskQuestion) -> TaskProgress:
        """How far the task of an id is, as the web UI's own page asks; without an id nothing is active."""
        task = None if question.id_task is None else self.find(client, question.id_task)
        if task is None:
            return TaskProgress(active=False, queued=False, completed=False, textinfo="Waiting...")
        job, place = task.job, self._engine.place(task.job)
        if place is not None:
            text = f"In queue: {place}/{self._engine.waiting}"
            return TaskProgress(active=False, queued=True, completed=False, textinfo=text)
        if job.over:
            return TaskProgress(active=False, queued=False, completed=True, progress=1.0)
        number = -1 if job.preview is None else job.preview.step
        new = bool(question.live_preview) and number not in (-1, question.id_live_preview)
        image = preview_of(job) if new else None
        return TaskProgress(
            active=True,
            queued=False,
            completed=False,
            progress=round(job.progress, 4),
            eta=job.seconds_left,
            live_preview=None if image is None else f"data:image/png;base64,{image}",
            id_live_preview=number if image is not None else question.id_live_preview,
        )


def _nameless(progress: ProgressAnswer) -> ProgressAnswer:
    return progress.model_copy(update={"state": progress.state.model_copy(update={"job": ""})})


def preview_of(job: Job) -> str | None:
    """The newest preview, base64."""
    return None if job.preview is None else base64.b64encode(job.preview.data).decode()


def timestamp(job: Job) -> str:
    """When a job was started, as the web UI writes it."""
    return time.strftime("%Y%m%d%H%M%S", time.localtime(job.started or job.created))
