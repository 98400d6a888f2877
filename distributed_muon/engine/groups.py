"""Process groups of our own, whose traffic meets no one else's and whose making does not depend on anyone's history."""

from __future__ import annotations

from collections.abc import Sequence

import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d


def make_group(
    parent: dist.ProcessGroup, ranks: Sequence[int], name: str, backend: str | None = None
) -> dist.ProcessGroup:
    """A process group of some of `parent`'s ranks, with its timeout; called by exactly these.

    `dist.new_group` has to be called by the whole world, or names the group by its ranks and by how many groups the
    process is in: a user's own `new_group([0, 2])` then lets ranks wait for each other under different names. What
    lies under it takes the name.

    Args:
        ranks: of `parent`, in order. name: unlike any other group's, alike on all of them.
        backend: None is the parent's.
    """
    members = [dist.get_global_rank(parent, rank) for rank in ranks]
    _, store = c10d._world.pg_map[dist.group.WORLD]
    backend = backend or c10d._world.pg_map[parent][0]
    options = parent._get_backend(parent._device_types[0]).options
    timeout = c10d.default_pg_timeout if options is None else options._timeout
    place = members.index(dist.get_rank())
    made, _ = c10d._new_process_group_helper(len(members), place, members, backend, store, name, timeout=timeout)
    c10d._world.pg_group_ranks[made] = {member: number for number, member in enumerate(members)}
    return made
