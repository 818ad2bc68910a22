"""The ranks that share a tensor, in the form that layers keep."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Union

import torch.distributed as dist

from flash_attn_ops.arguments import bad_argument

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


@dataclass(frozen=True)
class Group:
    """A process group as plain data, so that modules which hold one can be copied, pickled and compiled.

    ``name`` is how torch's functional collectives find the process group; it is empty for a single process.
    """

    name: str = ""
    size: int = 1
    rank: int = 0


GroupLike = Union["Group", "dist.ProcessGroup", "DeviceMesh", None]


def resolve_group(group: GroupLike) -> Group:
    """The :class:`Group` of a ProcessGroup, of a one-dimensional DeviceMesh, or of None: a single process.

    Raises:
        ValueError: for a mesh of several dimensions, a process group without this rank, or anything else.
    """
    if group is None:
        return Group()
    if isinstance(group, Group):
        return group
    if dist.is_available() and not isinstance(group, dist.ProcessGroup):
        from torch.distributed.device_mesh import DeviceMesh  # not loaded for those who use none

        if isinstance(group, DeviceMesh):
            if group.ndim != 1:
                raise bad_argument(
                    "group",
                    f"a DeviceMesh of {group.ndim} dimensions",
                    "a DeviceMesh of one dimension",
                    'take the tensor-parallel dimension: mesh["tp"]',
                )
            group = group.get_group()
    if not dist.is_available() or not isinstance(group, dist.ProcessGroup):
        raise bad_argument(
            "group",
            type(group).__name__,
            "a ProcessGroup that this rank is in, a one-dimensional DeviceMesh, or None for a single process",
            "make one with torch.distributed.new_group or init_device_mesh",
        )
    return Group(group.group_name, group.size(), group.rank())
