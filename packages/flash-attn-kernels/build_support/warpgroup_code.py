"""What must hold of the machine code of the Hopper kernels, or it is correct and slow. For tests.

The forward's main loop issues a tile's scores and the output product of the tile before, waits for the scores alone,
computes their softmax while the output product runs, and only then waits for that. ptxas may undo this: by serialising
products (C7510 and its kin), by moving the softmax behind the second wait, by spilling registers, or by copying
descriptors to uniform registers between the products of a chain, each of which then waits for the copy.

The backward's main loop issues the scores and their gradient together, and the products for dV, dQ and dK each before
it waits for the one before.

One thing makes code wrong, rarely: what threads store to tiles in shared memory, the tensor cores and the copy engine
see only behind a fence, which has to come before the barrier that announces it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from build_support.machine_code import Instruction, Resources

HIDDEN_SHARE = 0.8  # of the main loop's exponentials: at least so many run under the output product

# A product's sums, then its A: a descriptor if in shared memory, which are the scores, or registers.
_PRODUCT = re.compile(r"^HGMMA\.64x(\d+)x16\.\S+ R\d+, (gdesc|R\d+)")
_LOCAL = re.compile(r"^(LDL|STL)\b")
_TILE_STORE = re.compile(r"^(STS\.128|STSM)\b")  # descriptions of works are stored in words


@dataclass(frozen=True)
class Expected:
    """Of a kernel: its tiles and its launch."""

    head_dim: int
    head_dim_v: int
    columns: int
    consumers: int
    score_copies: int = 0  # to uniform registers between score products, at most

    @property
    def registers(self) -> int:
        threads = 128 * (self.consumers + 1)
        return 65536 // threads // 8 * 8


@dataclass(frozen=True)
class BackwardExpected:
    """Of a backward kernel."""

    head_dim: int
    rows: int  # queries of a tile
    columns: int = 128  # keys of a tile
    consumers: int = 2
    registers: int = 168


def problems(code: list[Instruction], resources: Resources, expected: Expected) -> list[str]:
    """What is wrong, in words; nothing if all is well."""
    found = _launch_problems(code, resources, expected) + _fence_problems(code)
    loop = main_loop(code)
    if loop is None:
        found.append("no loop computes both products")
    else:
        found += _loop_problems(loop, expected)
    return found


def backward_problems(code: list[Instruction], resources: Resources, expected: BackwardExpected) -> list[str]:
    """Likewise of a backward kernel."""
    found = _launch_problems(code, resources, expected) + _fence_problems(code)
    loop = main_loop(code)
    if loop is None:
        return [*found, "no loop computes products from shared memory and from registers"]
    scores = f"scores {expected.rows}"  # and their gradient, of a warpgroup's 64 keys
    keys = f"output {expected.head_dim}"  # dV and dK, from registers
    queries = "scores 64"  # dQ: of 64 rows 64 columns
    depth, steps = expected.head_dim // 16, expected.rows // 16
    order = [*[scores] * (2 * depth), "wait 1", "wait 0"]
    order += [*[keys] * steps, *[queries] * (expected.columns // 16), "wait 1"]
    order += [*[keys] * steps, "wait 1", "wait 0"]
    events, products = [], 0
    for instruction in loop:
        event, product = _event(instruction), _PRODUCT.match(instruction.text)
        if product:
            products += 1
            events.append(f"{event} {product.group(1)}")
        elif event.startswith("wait"):
            events.append(event)
        elif event == "copy" and products not in (0, depth, 2 * depth):
            found.append(f"an R2UR behind {products} of the main loop's products: {instruction.text}")
    if events != order:
        found.append(f"the main loop is not {', '.join(order)}, but {', '.join(events)}")
    return found


def _launch_problems(
    code: list[Instruction], resources: Resources, expected: Expected | BackwardExpected
) -> list[str]:
    found = []
    local = [instruction.text for instruction in code if _LOCAL.match(instruction.text)]
    if local:
        found.append(f"{len(local)} accesses to local memory, such as {local[0]}")
    if resources.stack_bytes or resources.local_bytes:
        found.append(f"{resources.stack_bytes} bytes of stack, {resources.local_bytes} of local memory")
    if resources.registers != expected.registers:
        found.append(f"{resources.registers} registers at launch instead of {expected.registers}")
    return found + _register_problems(code, expected)


def _fence_problems(code: list[Instruction]) -> list[str]:
    """Barriers that announce what is stored to tiles, and have no fence behind the stores."""
    found, stored = [], ""
    for instruction in code:
        if _TILE_STORE.match(instruction.text):
            stored = instruction.text
        elif instruction.opcode.startswith("FENCE.VIEW.ASYNC"):
            stored = ""
        elif stored and instruction.opcode.startswith("BAR."):
            found.append(f"no fence between {stored} and {instruction.text}")
            stored = ""
    return found


def main_loop(code: list[Instruction]) -> list[Instruction] | None:
    """The shortest loop with products of both kinds."""
    loops = []
    for branch in code:
        target = branch.branch_target()
        if target is None or target > branch.address:
            continue
        body = [instruction for instruction in code if target <= instruction.address <= branch.address]
        if {"scores", "output"} <= {_event(instruction) for instruction in body}:
            loops.append(body)
    return min(loops, key=len, default=None)


def _register_problems(code: list[Instruction], expected: Expected | BackwardExpected) -> list[str]:
    counts: dict[str, set[int]] = {"DEALLOC": set(), "TRY_ALLOC": set()}
    for instruction in code:
        found = re.match(r"^USETMAXREG\.(\w+)\S* .*\b0x([0-9a-f]+)$", instruction.text)
        if found and found.group(1) in counts:
            counts[found.group(1)].add(int(found.group(2), 16))
    if any(len(values) != 1 for values in counts.values()):
        return [f"setmaxnreg is ignored, or there are several: {counts}"]
    (released,), (acquired,) = counts.values()
    given = (expected.consumers + 1) * expected.registers
    if expected.consumers * acquired + released > given:
        return [
            f"{expected.consumers} x {acquired} + {released} registers are more than the {given} launched"
        ]
    return []


def _event(instruction: Instruction) -> str:
    product = _PRODUCT.match(instruction.text)
    if product:
        return "scores" if product.group(2) == "gdesc" else "output"
    if instruction.opcode.startswith("WARPGROUP.DEPBAR"):
        return "wait " + str(int(instruction.text.rsplit(maxsplit=1)[1], 16))
    return {"MUFU.EX2": "exponential", "R2UR": "copy"}.get(instruction.opcode, "")


def _loop_problems(loop: list[Instruction], expected: Expected) -> list[str]:
    events = [_event(instruction) for instruction in loop]
    found = []
    order = [event for event in events if event in ("scores", "output") or event.startswith("wait")]
    scores, outputs = expected.head_dim // 16, expected.columns // 16
    if order != ["scores"] * scores + ["output"] * outputs + ["wait 1", "wait 0"]:
        found.append(
            f"the main loop is not {scores} products for scores, {outputs} for the output, wait 1, wait 0, "
            f"but {', '.join(order)}"
        )
    widths = {"scores": expected.columns, "output": expected.head_dim_v}
    for instruction, event in zip(loop, events, strict=True):
        product = _PRODUCT.match(instruction.text)
        if product and int(product.group(1)) != widths[event]:
            found.append(f"a product for {event} is not {widths[event]} wide: {instruction.text}")
    found += _softmax_problems(events, expected)
    for kind, allowed in (("scores", expected.score_copies), ("output", 0)):
        places = [place for place, event in enumerate(events) if event == kind]
        copies = events[places[0] : places[-1]].count("copy")
        if copies > allowed:
            found.append(f"{copies} R2UR between the products for {kind}, {allowed} expected")
    return found


def _softmax_problems(events: list[str], expected: Expected) -> list[str]:
    total = events.count("exponential")
    if total < expected.columns // 4:  # of columns / 2 that a thread has
        return [f"{total} exponentials in the main loop: its softmax is somewhere else"]
    if "wait 1" not in events or "wait 0" not in events[events.index("wait 1") :]:
        return []  # said already
    first = events.index("wait 1")
    hidden = events[first : events.index("wait 0", first)].count("exponential")
    if hidden < HIDDEN_SHARE * total:
        return [
            f"{hidden} of {total} exponentials are between the waits: the softmax does not run under a product"
        ]
    return []
