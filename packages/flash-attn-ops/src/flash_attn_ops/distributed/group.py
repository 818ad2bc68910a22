"""The ranks that share a tensor, in the form that layers keep."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Union

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
    group = _own_process_group(group, "group")
    return Group(group.group_name, group.size(), group.rank())


def process_group_of(process_group: GroupLike) -> dist.ProcessGroup | None:
    """What torch.distributed's own functions take: the ProcessGroup, or None for a single process.

    Raises:
        ValueError: as :func:`resolve_group`, and for a :class:`Group` that this process does not know.
    """
    if process_group is None or process_group == Group():
        return None
    if not isinstance(process_group, Group):
        return _own_process_group(process_group, "process_group")
    name: Any = process_group.name  # whose type differs between releases of torch
    try:
        return dist.distributed_c10d._resolve_process_group(name)
    except RuntimeError:
        raise _no_group("process_group", process_group) from None


def _own_process_group(group: dist.ProcessGroup | DeviceMesh, argument: str) -> dist.ProcessGroup:
    if dist.is_available() and not isinstance(group, dist.ProcessGroup):
        from torch.distributed.device_mesh import DeviceMesh  # not loaded for those who use none

        if isinstance(group, DeviceMesh):
            if group.ndim != 1:
                raise bad_argument(
                    argument,
                    f"a DeviceMesh of {group.ndim} dimensions",
                    "a DeviceMesh of one dimension",
                    'take the tensor-parallel dimension: mesh["tp"]',
                )
            group = group.get_group()
    if not dist.is_available() or not isinstance(group, dist.ProcessGroup):
        raise _no_group(argument, type(group).__name__)
    return group


def _no_group(argument: str, got: object) -> ValueError:
    return bad_argument(
        argument,
        got,
        "a ProcessGroup that this rank is in, a one-dimensional DeviceMesh, or None for a single process",
        "make one with torch.distributed.new_group or init_device_mesh",
    )
