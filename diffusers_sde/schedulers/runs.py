"""The runs of a scheduler: what was laid out, how far each run has come, and which run a step belongs to.

A run belongs to its timesteps: an element of ``scheduler.timesteps`` knows the memory it lies in, so a step finds its
run whatever thread it is taken on and whatever has been laid out since.  Everything here is immutable (but for the
``sigmas`` that pipelines write into), so that copies of a scheduler, however they are made, go on independently.

Knows nodes, tensors and positions.  Knows nothing of configs or of how tables are made.
"""

from __future__ import annotations

import copy
import itertools
import threading
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch

from diffusers_sde.grids import Nodes
from diffusers_sde.schedulers.compiled import Compiled

LOCK = threading.Lock()  # held while a scheduler's runs are replaced, never while anything is computed
_new_key = itertools.count().__next__


@dataclass(frozen=True, eq=False)
class Layout:
    """What ``set_timesteps`` decided.

    nodes: the levels of the n evaluations and of the end.  sigmas: float32 (n + 1,) on the CPU, which pipelines may
    write into; labels: as first written.  choice: ``(n, mu)`` of a grid that was the scheduler's own choice, None for
    one that somebody asked for.  start: the row from which such a grid was laid out anew for a run that starts there,
    whole: the nodes before.
    """

    nodes: Nodes
    sigmas: torch.Tensor
    labels: np.ndarray
    choice: tuple[int, float | None] | None = None
    start: int = 0
    whole: Nodes | None = None

    def __len__(self) -> int:
        """The number of evaluations."""
        return len(self.nodes) - 1


class Run(NamedTuple):
    """One sampling run at one moment.

    timesteps: what the network is asked at, None where only its holders keep it alive; storages: weak references to the
    memory that its elements of ``dtype`` lie in, from ``offset`` on in steps of ``stride``.  key: the same as long as
    it is the same run.  begin: the start that a pipeline has set, first: the row at which the loop began, next: the row
    to come.  history: the evaluations that later rows read, newest first; before: those that the last step read.
    output: a weak reference to the last ``prev_sample``.  tiled: the last step was taken on copies of the batch; twice:
    some step was taken twice; released: its evaluations were given back because nobody held its timesteps any more.
    """

    layout: Layout
    timesteps: torch.Tensor | None
    storages: tuple[weakref.ref, ...]
    dtype: torch.dtype
    offset: int
    stride: int
    thread: int
    key: int
    begin: int | None = None
    first: int | None = None
    next: int | None = None
    compiled: Compiled | None = None
    history: tuple[torch.Tensor, ...] = ()
    seeds: torch.Tensor | None = None
    before: tuple[torch.Tensor, ...] | None = None
    output: weakref.ref | None = None
    tiled: bool = False
    twice: bool = False
    released: bool = False

    @property
    def nodes(self) -> Nodes:
        """The levels as laid out."""
        return self.layout.nodes

    @property
    def finished(self) -> bool:
        """Whether all rows have been run."""
        return self.next is not None and self.next >= len(self.layout)

    @property
    def stands_at(self) -> int | None:
        """The node that the state is at: of the next row, at the start of ``begin``, the end after the last row; None
        where no start is known."""
        return self.begin if self.next is None else min(self.next, len(self.layout))

    def tensor(self) -> torch.Tensor | None:
        """Its timesteps, as long as anybody keeps them alive."""
        if self.timesteps is not None:
            return self.timesteps
        storage = next((held for reference in self.storages if (held := reference()) is not None), None)
        if storage is None:
            return None
        own = torch.empty(0, dtype=self.dtype, device=storage.device)
        return own.set_(storage, self.offset, (len(self.layout),), (self.stride,))

    def owns(self, storage: Any) -> bool:
        """Whether ``storage`` is the memory of this run's timesteps."""
        return any(reference() is storage for reference in self.storages)

    def row(self, timestep: torch.Tensor) -> int:
        """The row of an element of the memory of this run's timesteps; raises ``ValueError`` for one that was left out
        when a part of them was assigned."""
        row = (timestep.storage_offset() - self.offset) // self.stride
        if not 0 <= row < len(self.layout):
            raise ValueError("This timestep was left out of scheduler.timesteps: take its elements as they are now.")
        return row

    def asked_at(self, timesteps: torch.Tensor) -> Run:
        """The run whose network is asked at ``timesteps`` (n,)."""
        return self._replace(
            timesteps=timesteps,
            storages=(weakref.ref(timesteps.untyped_storage()),),
            dtype=timesteps.dtype,
            offset=timesteps.storage_offset(),
            stride=max(timesteps.stride(0), 1),
        )

    def anew(self, row: int | None = None) -> Run:
        """A new run on the same layout, which has not begun or is about to begin at ``row``."""
        return new_run(self.layout, self.timesteps, self.begin)._replace(
            storages=self.storages, dtype=self.dtype, offset=self.offset, stride=self.stride, first=row, next=row
        )

    def put_back(self, row: int | None) -> Run:
        """The run with ``row`` as the next one: as it was if that is the row just taken, with the same noise; else it
        begins there."""
        if row == self.next:
            return self
        if self.before is not None and self.next is not None and row == self.next - 1:
            return self._replace(next=row, history=self.before, before=None, tiled=False, twice=True)
        return self.anew(row)

    def about_to(self, row: int) -> Run:
        """The run whose next step is ``row``: itself, or a new one that begins there.

        Raises ``ValueError`` where the row contradicts what has been run.
        """
        if self.released:
            raise ValueError("This run was interrupted and its evaluations are gone: call set_timesteps again.")
        if self.next == row:
            if self.tiled:
                raise ValueError(
                    "The batch grew in the middle of a run: call reorder with the samples it goes on with."
                )
            return self
        if self.next is None or self.finished or row in (self.first, self.begin) or row < (self.first or 0):
            return self.anew(row)
        if self.compiled is not None and self.compiled.memoryless:
            return self._replace(next=row)
        raise ValueError(
            f"This timestep is row {row} of a run that stands at row {self.next}: take the steps of a run in order, "
            "call set_timesteps or set_begin_index for a new run, and copy the scheduler for several runs at once."
        )


def new_run(layout: Layout, timesteps: torch.Tensor | None, begin: int | None = None) -> Run:
    """A run that has not begun."""
    run = Run(layout, None, (), torch.float32, 0, 1, threading.get_ident(), _new_key(), begin)
    return run if timesteps is None else run.asked_at(timesteps)


@dataclass(eq=False, slots=True)
class Runs:
    """The runs of one scheduler: the one last laid out or stepped, and those that may still go on, latest first.

    Never changed, though not declared so: that would cost as much as all else at each step.
    """

    current: Run | None = None
    others: tuple[Run, ...] = ()

    def __iter__(self) -> Iterator[Run]:
        """All runs, latest first."""
        return iter(() if self.current is None else (self.current, *self.others))

    def of_thread(self) -> Run | None:
        """The unfinished run that this thread laid out or stepped last, else the current one."""
        if self.others:
            me = threading.get_ident()
            mine = next((run for run in self if run.thread == me), None)
            if mine is not None and not mine.finished:
                return mine
        return self.current

    def find(self, timestep: Any, sample: Any) -> tuple[Run | None, int | None]:
        """The run that a step at ``timestep`` from ``sample`` belongs to, and its row where the timestep knows it.

        Raises ``ValueError`` where several runs on the same timesteps stand there and the sample is the result of none.
        """
        if isinstance(timestep, torch.Tensor) and is_single(timestep):
            storage, current = timestep.untyped_storage(), self.current
            if not self.others and current is not None and current.owns(storage):
                return current, current.row(timestep)
            owners = [run for run in self if run.owns(storage)]
            if owners:
                run = owners[0] if len(owners) == 1 else _last_returned(owners, sample)
                if run is None:
                    there = [run for run in owners if run.next == run.row(timestep)]
                    if len(there) > 1:
                        raise ValueError(
                            "Several runs on these timesteps stand here and the sample is the result of none of them: "
                            "call set_timesteps for each run, or give each a copy of the scheduler."
                        )
                    run = there[0] if there else owners[0]
                return run, run.row(timestep)
        return (_last_returned(self, sample) if self.others else None) or self.of_thread(), None

    def with_current(self, run: Run) -> Runs:
        """The runs with ``run``, new or changed, as the current one; only it keeps its timesteps alive."""
        if self.current is None or (self.current.key == run.key and not self.others):
            return Runs(run)
        return Runs(run, tuple(other for other in self if other.key != run.key)).without_abandoned()

    def without_abandoned(self) -> Runs:
        """The runs but for those that nobody can go on with."""
        if not self.others:
            return self
        kept: list[Run] = []
        for run in self:
            waiting = _waiting(run, kept) if kept else run
            if waiting is not None:
                kept.append(waiting)
        return Runs(kept[0], tuple(kept[1:]))

    def independent(self) -> Runs:
        """The same runs with ``sigmas`` of their own."""
        own = [
            run._replace(layout=replace(run.layout, sigmas=run.layout.sigmas.clone()), thread=threading.get_ident())
            for run in self
        ]
        return Runs(own[0], tuple(own[1:])) if own else self

    def __deepcopy__(self, memo: dict[int, Any]) -> Runs:
        copies = [Run._make(copy.deepcopy(value, memo) for value in run) for run in self]
        return _with_references(copies, old=True)

    def __reduce__(self) -> tuple[Any, ...]:
        bare = [run._replace(storages=(), output=None) for run in self if run.timesteps is not None]
        return _with_references, (bare,)


# -- rows by value: for timesteps that are no elements of the run's own --


def nearest_row(layout: Layout, timestep: Any) -> int:
    """The row nearest to ``timestep`` (a number, or a tensor whose first value counts)."""
    value = float(timestep.flatten()[0]) if isinstance(timestep, torch.Tensor) else float(timestep)
    return int(np.argmin(np.abs(layout.nodes.time[:-1] - value)))


def row_by_value(run: Run, timestep: Any) -> int:
    """The row that a step at ``timestep`` means: the one whose turn it is unless the value is another row's.

    A single value on an accelerator is not read back where the run knows its next row.  Raises ``ValueError`` for a
    tensor of several values.
    """
    expected = run.begin if run.next is None else None if run.finished else run.next
    if isinstance(timestep, torch.Tensor):
        if timestep.numel() != 1 and not is_single(timestep):
            if timestep.numel() == 0 or bool((timestep != timestep.flatten()[0]).any()):
                raise ValueError(
                    "A step has one timestep for the whole batch, this one has several: step the samples of each with "
                    "a copy of the scheduler."
                )
        elif expected is not None and timestep.device.type != "cpu":
            return expected
    nearest = nearest_row(run.layout, timestep)
    if expected is None:
        return nearest
    value = float(timestep.flatten()[0]) if isinstance(timestep, torch.Tensor) else float(timestep)
    distance = np.abs(run.layout.nodes.time[:-1] - value)
    return nearest if distance[nearest] <= _rounding(run.layout, value) < distance[expected] else expected


def kept_rows(run: Run, timesteps: torch.Tensor) -> np.ndarray | None:
    """The nodes that remain if ``timesteps`` (m,) take the place of the run's own, the end included: where they are a
    part of them, in memory or in value, and no others; None where they are not."""
    n = len(run.layout)
    if timesteps.ndim == 1 and len(timesteps) and run.owns(timesteps.untyped_storage()):
        places = timesteps.storage_offset() - run.offset + np.arange(len(timesteps)) * max(timesteps.stride(0), 1)
        rows = places // run.stride
        if rows[0] < 0 or rows[-1] >= n:
            return None
    elif timesteps.shape == (n,) and timesteps.device.type == "meta":
        rows = np.arange(n)
    else:
        times, found = run.layout.nodes.time[:-1], [-1]
        for value in timesteps.flatten().tolist():
            rest = np.abs(times[found[-1] + 1 :] - value)
            if not len(rest) or rest.min() > _rounding(run.layout, value):
                return None
            found.append(found[-1] + 1 + int(rest.argmin()))
        rows = np.array(found[1:], int)
    contiguous = len(rows) > 0 and bool(np.all(np.diff(rows) == 1))
    return np.append(rows, rows[-1] + 1 if contiguous else n)


def _rounding(layout: Layout, value: float) -> float:
    """How far a timestep may be off by the dtypes that it passed through: half precision, integers."""
    times = layout.nodes.time[:-1]
    whole = value.is_integer() and abs(times[0] - times[-1]) > 10
    return max(2.0**-8 * abs(value), 1e-6, 0.999 if whole else 0.0)


def is_single(timestep: torch.Tensor) -> bool:
    """Whether all elements are the same place in memory."""
    return timestep.numel() == 1 or not any(timestep.stride())


def _last_returned(runs: Iterable[Run], sample: Any) -> Run | None:
    """The run whose last result is ``sample``."""
    return next((run for run in runs if run.output is not None and run.output() is sample), None)


def _waiting(run: Run, later: Sequence[Run]) -> Run | None:
    """``run`` as it waits for its next step while ``later`` ones are going on; None if there can be none."""
    if run.finished:
        return None
    if run.storages is later[0].storages:  # a loop was begun anew: only its own result can still tell the two apart
        return run if run.output is not None and run.output() is not None else None
    latest_of_thread = all(other.thread != run.thread for other in later)
    may_return = latest_of_thread and any(thread.ident == run.thread for thread in threading.enumerate())
    if run.next is None and may_return:
        return run
    run = run._replace(timesteps=None)
    if any(reference() is not None for reference in run.storages):
        return run
    return run._replace(history=(), before=None, seeds=None, compiled=None, released=True) if may_return else None


def _with_references(runs: list[Run], old: bool = False) -> Runs:
    """Copied runs, found by their own timesteps too; by those that they were copied from only if ``old``."""
    found = []
    for run in runs:
        if run.timesteps is not None:
            copied = run.asked_at(run.timesteps)
            run = copied._replace(storages=(*copied.storages, *run.storages)) if old else copied
        found.append(run)
    return Runs(found[0], tuple(found[1:])) if found else Runs()
