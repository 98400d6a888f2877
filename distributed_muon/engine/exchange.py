"""Moves a plan's pieces: from the holders' updates to whole matrices at their homes, and back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from distributed_muon.engine.collectives import Collectives, Pending
from distributed_muon.layout.pieces import Piece
from distributed_muon.layout.plan import Transfer


def held_view(shard: Tensor, piece: Piece) -> Tensor:
    """The (rows, cols) elements of `piece` in the 1-D shard that holds it, as a view."""
    return shard.as_strided((piece.rows, piece.cols), (piece.stride, 1), shard.storage_offset() + piece.offset)


def matrix_view(matrix: Tensor, piece: Piece) -> Tensor:
    """The (rows, cols) elements of `piece` in the contiguous whole matrix, as a view."""
    return matrix.as_strided((piece.rows, piece.cols), (piece.pitch, 1), matrix.storage_offset() + piece.at)


def wire_views(buffer: Tensor, pieces: Sequence[Piece]) -> list[Tensor]:
    """The (rows, cols) slot of each piece in a 1-D wire buffer that packs them one after the other."""
    parts = buffer.split([piece.numel for piece in pieces])
    return [part.view(piece.rows, piece.cols) for part, piece in zip(parts, pieces, strict=True)]


class Shipment:
    """One transfer of one wave: fill `outgoing`, `start()`, `wait()`, read `incoming`.

    Args:
        transfer: this rank's part. collectives: over the plan's rank domain.
        dtype, device: of the wire. label: what its all-to-all is timed as.

    Attributes:
        outgoing, incoming: one (rows, cols) tensor per piece of transfer.send and transfer.recv.
    """

    def __init__(
        self, transfer: Transfer, collectives: Collectives, dtype: torch.dtype, device: torch.device, label: str
    ) -> None:
        self._transfer, self._collectives, self._label = transfer, collectives, label
        self._sent = torch.empty(sum(transfer.send_counts), dtype=dtype, device=device)
        self._received = torch.empty(sum(transfer.recv_counts), dtype=dtype, device=device)
        self.outgoing = wire_views(self._sent, transfer.send)
        self.incoming = wire_views(self._received, transfer.recv)
        self._pending = Pending(())

    def start(self) -> None:
        """Begin the all-to-all; collective over the plan's domain unless the whole transfer is idle."""
        if not self._transfer.idle:
            self._pending = self._collectives.all_to_all(
                self._received, self._sent, self._transfer.recv_counts, self._transfer.send_counts, self._label
            )

    def wait(self) -> None:
        """Return when `incoming` can be read; `outgoing` may then be freed."""
        self._pending.wait()
