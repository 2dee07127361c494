"""Drawing on many GPUs and machines with Ray Data: workers hold the model, batches go in, pictures come out.

Ray is optional and imported when it is asked for. A worker that dies is started again and its batch drawn again; as
what a batch shows does not depend on where it is drawn, nobody can tell afterwards. Only the process that started the
run writes, so the workers need the model's files at the same place, and not the folder of the pictures.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from inspect import signature
from pathlib import Path
from typing import Any

from ..errors import UserError, quoted
from .draw import Drawer, Job, Picture
from .folder import Drawn
from .table import Row, Skipped

LOCAL = "local"  # in place of an address: Ray is started on this machine, and ended with the run
SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",  # nothing is reported to anybody
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    "RAY_DATA_LOG_LEVEL": "ERROR",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
# Of a Ray that is started here, which ends with the run: nobody would read what these collect, and on a machine of few
# cores the workers lack the time that collecting takes.
UNWATCHED = {
    "RAY_enable_metrics_collection": "0",
    "RAY_task_events_report_interval_ms": "0",  # 0: none, for `ray list tasks` and the dashboard
    "RAY_event_stats": "0",
}
PACKAGE = Path(__file__).parents[1]
RESTARTS = 100  # of a worker, and of a batch whose worker died; more often, something is wrong
OBJECT_STORE = 256 * 2**20  # bytes of a local Ray's shared memory: batches and pictures are small


@dataclass(frozen=True)
class Workers:
    """How many workers, and what each gets.

    address  of a Ray cluster, or LOCAL
    count    0: one for every GPU or share of one; without GPUs, one for every core
    gpus     of each worker: 1, or a share such as 0.5; 0 on a CPU. None: 1 where there are GPUs
    """

    address: str = LOCAL
    count: int = 0
    gpus: float | None = None

    def __post_init__(self) -> None:
        if self.count < 0:
            raise UserError(f"workers: {self.count} is out of range; choose 1 or more, or 0 for one a GPU.")
        if self.gpus is not None and not (0 <= self.gpus <= 1 or self.gpus == int(self.gpus)):
            raise UserError(f"gpus: {self.gpus:g} is neither a share of a GPU nor a whole number; choose 0.5, say.")


def import_ray(address: str = LOCAL) -> Any:
    """The module ray. Raises UserError if it, or what Ray Data needs, is missing."""
    for name, value in (SETTINGS | (UNWATCHED if address == LOCAL else {})).items():
        os.environ.setdefault(name, value)
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise UserError(f"ray: it needs the Python package ray with its data part ({error}); run pip install "
                        "'ray[data]'.") from error  # fmt: skip
    return ray


def draw_over_ray(
    job: Job, batches: Sequence[list[Picture]], workers: Workers, tell: Callable[[str], None]
) -> Iterator[list[Drawn | Skipped]]:
    """Draw all batches on workers; yields each as it is done, in any order. Ends when the last one is done.

    Raises UserError for what concerns all pictures, and if a worker dies again and again.
    """
    ray = import_ray(workers.address)
    with _started(ray, workers):
        count, gpus, cpus = _layout(ray, workers, len(batches))
        tell(f"{count} workers{f' with {gpus:g} GPU each' if gpus else ''}")
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False  # the run has its own
        items = [{"batch": number, "pictures": _written(batch)} for number, batch in enumerate(batches)]
        data = ray.data.from_items(items, override_num_blocks=len(items))
        known = signature(data.map_batches).parameters
        # Ray 2.60 warns that 2.64 takes this limit away; a worker is then started again however often it dies.
        limit = {"ray_remote_args_fn": _restarts} if "ray_remote_args_fn" in known else {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            drawn = data.map_batches(
                Worker, fn_constructor_args=(job,), batch_size=1, num_gpus=gpus, num_cpus=cpus,
                compute=ray.data.ActorPoolStrategy(size=count), **limit,
            )  # fmt: skip
        seen = set()
        try:
            for found in drawn.iter_rows():
                if found["error"]:
                    raise UserError(found["error"])
                if found["batch"] not in seen:
                    seen.add(found["batch"])
                    yield list(_read(found["metadata"], found["pngs"]))
        except ray.exceptions.RayError as error:
            raise UserError(f"ray: a worker died again and again ({_reason(error)}); see Ray's logs.") from error


class Worker:
    """What runs in each of Ray's workers: a model, and batch after batch."""

    def __init__(self, job: Job):
        self.error, self.drawer = "", None
        try:
            self.drawer = Drawer(job)
        except UserError as error:
            self.error = str(error)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        """One batch, as its number and its pictures in JSON -> its number, metadata in JSON, and PNGs."""
        (number,), (written,) = batch["batch"], batch["pictures"]
        done: list[Drawn | Skipped] = []
        if self.drawer is not None:
            try:
                done = self.drawer.draw(_pictures(written))
            except UserError as error:
                self.error = str(error)
        metadata = [d.metadata if isinstance(d, Drawn) else {"skipped": asdict(d)} for d in done]
        pngs = [d.png if isinstance(d, Drawn) else b"" for d in done]
        result = {"batch": int(number), "metadata": json.dumps(metadata), "pngs": pngs, "error": self.error}
        return {name: [value] for name, value in result.items()}


@contextmanager
def _started(ray: Any, workers: Workers) -> Iterator[None]:
    """Ray, on this machine or at an address. What was started here is ended here."""
    local = workers.address == LOCAL
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR", "configure_logging": True}
    if local:
        options |= {"include_dashboard": False, "object_store_memory": OBJECT_STORE}
    else:
        os.environ.setdefault("RAY_gcs_server_port_wait_time_s", "2")  # tries, or nobody there takes many minutes
        # The code travels, the model's files do not.
        options["runtime_env"] = {"py_modules": [str(PACKAGE)], "excludes": ["assets/*.safetensors"]}
    try:
        with _package_on_path() if local else nullcontext():
            ray.init(address=workers.address, **options)
    except Exception as error:  # Ray has many
        raise UserError(
            f"ray: it cannot be started at {quoted(workers.address)} ({_reason(error)}); give the address of a running "
            "cluster, or none to start it here."
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def _package_on_path() -> Iterator[None]:
    """Processes that are started here find the package. A `runtime_env` would see to it, too, but the workers that Ray
    has started ahead would then be of no use.
    """
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(PACKAGE.parent), *filter(None, [before])])
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def _layout(ray: Any, workers: Workers, batches: int) -> tuple[int, float, float]:
    """How many workers, and GPUs and cores of each. Raises UserError if the cluster has not that much."""
    there = ray.cluster_resources()
    gpus, cores = there.get("GPU", 0), max(1, int(there.get("CPU", 1)))
    each = workers.gpus if workers.gpus is not None else min(1.0, gpus)
    if each > gpus:
        raise UserError(f"gpus: a worker is to get {each:g}, but Ray sees {gpus:g}; choose fewer, or --gpus 0.")
    most = int(gpus / each) if each else cores
    count = min(workers.count or most, max(1, batches))
    if count > most:
        raise UserError(
            f"workers: {count} are more than the {most} that Ray has {'GPUs' if each else 'cores'} for; choose fewer"
            f"{', or a share of a GPU each with --gpus' if each else ''}."
        )
    return count, each, max(1, cores // count)


def _restarts() -> dict[str, int]:
    return {"max_restarts": RESTARTS, "max_task_retries": RESTARTS}


def _reason(error: BaseException) -> str:
    return (str(error).strip().split("\n")[0] or type(error).__name__).rstrip(".")[:200]


def _written(batch: Sequence[Picture]) -> str:
    return json.dumps([asdict(picture) for picture in batch])


def _pictures(written: str) -> list[Picture]:
    return [Picture(**each | {"row": Row(**each["row"])}) for each in json.loads(written)]


def _read(metadata: str, pngs: Sequence[bytes]) -> Iterator[Drawn | Skipped]:
    for row, png in zip(json.loads(metadata), pngs, strict=True):
        yield Skipped(**row["skipped"]) if "skipped" in row else Drawn(row, bytes(png))
