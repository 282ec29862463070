"""From a stream to micro-batches: which process reads what, shuffled how, and where to go on.

An epoch goes through the shards in an order of its own. Every process takes its part of them, as `datasets` does in
`split_dataset_by_node` (whole shards where they can be dealt evenly, else every `world`-th row), gathers rows in
blocks, and shuffles each block. So a sample's place is told by four numbers, and going on there reads at most one
shard up to it and one block. The process that trains reads the rows; its workers, of any number, decode them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from m3.data.loader import Order, shuffled
from m3.data.source import Drawn, Row, Stream
from m3.errors import M3Error
from m3.random import stream_number


class Place(NamedTuple):
    """Where one process stands in a stream.

    Attributes:
        epoch: passes through the stream that are finished.
        turn: shards of this epoch that were finished where the block begins.
        row: rows of the next shard that lie before the block.
        drawn: samples of the block that are used up.
    """

    epoch: int = 0
    turn: int = 0
    row: int = 0
    drawn: int = 0


class StreamOrder:
    """The micro-batches of one process, as `Order` makes them of numbered samples.

    Positions say who trains on what as in `Order`, but which sample has a position depends on the number of
    processes. Their parts of a stream may differ in length by as much as its shards do: each goes on to its next
    epoch when its own part is done, so that every epoch visits every sample once.
    """

    def __init__(self, stream: Stream, order: Order, place: Place) -> None:
        """Start at the order's first step.

        Args:
            stream: what is read.
            order: numbers of the run; its `length` means nothing here.
            place: where the first step begins.
        """
        self.stream, self.order = stream, order
        self.places = {order.start: place}
        """Step -> where it begins, for steps since the last checkpoint; loading runs ahead of training."""

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[Drawn]:
        """Yield the micro-batches of this process."""
        order = self.order
        per_step = order.accumulation * order.micro_batch
        uses = self._uses(self.places[order.start], order.start * per_step % order.repeats)
        for step in range(order.start, order.stop):
            first = (step * order.world + order.rank) * per_step
            for turn in range(order.accumulation):
                drawn = [next(uses) for _ in range(order.micro_batch)]
                if turn == order.accumulation - 1:
                    self.places[step + 1] = drawn[-1][0]
                yield _packed([row for _, row in drawn], first + turn * order.micro_batch)

    def state(self, step: int) -> dict[str, Any]:
        """Return where step `step` begins for this process, for a checkpoint; earlier steps are forgotten."""
        self.places = {known: place for known, place in self.places.items() if known >= step}
        return {"processes": self.order.world, "place": self.places[step]._asdict()}

    def _uses(self, place: Place, used: int) -> Iterator[tuple[Place, Row]]:
        """Yield every sample as often as it is used, each time with the place to go on from after that use.

        Args:
            place: where to begin.
            used: how often the sample there was used already.
        """
        for begin, block in self._blocks(place):
            start = place.drawn if begin == place._replace(drawn=0) else 0
            for drawn in range(start, len(block)):
                for use in range(used + 1, self.order.repeats + 1):
                    yield begin._replace(drawn=drawn + (use == self.order.repeats)), block[drawn]
                used = 0

    def _blocks(self, place: Place) -> Iterator[tuple[Place, list[Row]]]:
        """Yield shuffled blocks without end, each with the place where it begins; none reaches into a next epoch."""
        begin = place._replace(drawn=0)
        while True:
            block: list[Row] = []
            for row, after in self._rows(begin):
                block.append(row)
                if len(block) == self.stream.buffer:
                    yield begin, self._mixed(block, begin)
                    begin, block = after, []
            if block:
                yield begin, self._mixed(block, begin)
            elif begin == Place(begin.epoch):
                raise M3Error(
                    f"data: process {self.order.rank} of {self.order.world} finds no samples in its part of the "
                    f"stream; add data or use fewer processes."
                )
            begin = Place(begin.epoch + 1)

    def _rows(self, begin: Place) -> Iterator[tuple[Row, Place]]:
        """Yield this process's rows of an epoch, each with the place behind it."""
        rank, world = self.order.rank, self.order.world
        shards = shuffled(self.stream.shards, self.order.seed, begin.epoch).tolist()
        are_dealt = len(shards) % world == 0
        shards = shards[rank::world] if are_dealt else shards
        for turn in range(begin.turn, len(shards)):
            for number, row in self.stream.rows(shards[turn], begin.row if turn == begin.turn else 0):
                if are_dealt or number % world == rank:
                    yield row, Place(begin.epoch, turn, number + 1)

    def _mixed(self, block: list[Row], begin: Place) -> list[Row]:
        key = stream_number(f"block/{self.order.seed}/{self.order.rank}/{begin.epoch}/{begin.turn}/{begin.row}")
        order = torch.randperm(len(block), generator=torch.Generator().manual_seed(key))
        return [block[i] for i in order.tolist()]


def _packed(uses: list[Row], first: int) -> Drawn:
    """Give the uses of samples positions from `first` on; a sample used several times in a row is sent once."""
    rows: list[Row] = []
    pairs = []
    for position, row in enumerate(uses, first):
        if not rows or rows[-1] is not row:
            rows.append(row)
        pairs.append((position, len(rows) - 1))
    return Drawn(pairs, rows)


def save_place(folder: Path, rank: int, state: dict[str, Any]) -> None:
    """Write a process's `StreamOrder.state` into a checkpoint."""
    _file(folder, rank).write_text(json.dumps(state), encoding="utf-8")


def load_place(checkpoint: Path, rank: int, world: int) -> Place:
    """Read where a process goes on from a checkpoint.

    Raises:
        M3Error: another number of processes shared the stream.
    """
    state = json.loads(_file(checkpoint, 0).read_text(encoding="utf-8"))
    if state["processes"] != world:
        raise M3Error(
            f"{checkpoint}: {state['processes']} process(es) shared the stream there and {world} would here, so some "
            f"samples would be repeated and others left out; resume with {state['processes']} or start anew without "
            f"--resume."
        )
    return Place(**json.loads(_file(checkpoint, rank).read_text(encoding="utf-8"))["place"])


def _file(folder: Path, rank: int) -> Path:
    return folder / f"stream-{rank:05d}.json"
