"""One transfer of one wave: an all-to-all between a slot's two wires."""

from __future__ import annotations

from torch import Tensor

from distributed_muon.engine.collectives import Collectives, Pending
from distributed_muon.layout.plan import Transfer


class Shipment:
    """Fill `sent`, `start()`, `wait()`, read `received`.

    Args:
        transfer: this rank's part, pieces packed in its order. collectives: over the plan's rank domain.
        sent, received: 1-D wires, at least as long as the transfer. label: what its all-to-all is timed as.
    """

    def __init__(
        self, transfer: Transfer, collectives: Collectives, sent: Tensor, received: Tensor, label: str
    ) -> None:
        self._transfer, self._collectives, self._label = transfer, collectives, label
        self._sent = sent.narrow(0, 0, sum(transfer.send_counts))
        self._received = received.narrow(0, 0, sum(transfer.recv_counts))
        self._pending = Pending(())

    def start(self) -> None:
        """Begin the all-to-all; collective over the plan's domain unless the whole transfer is idle."""
        if not self._transfer.idle:
            self._pending = self._collectives.all_to_all(
                self._received, self._sent, self._transfer.recv_counts, self._transfer.send_counts, self._label
            )

    def wait(self) -> None:
        """Return when `received` can be read and `sent` be written again."""
        self._pending.wait()
