"""The machine code of every Hopper kernel: that nothing undid what makes it fast. Needs no GPU.

Read from the compiled library if that is newer than its sources, else compiled here, a unit a test. What ptxas warns
about (C7504 to C7515) fails the build of a library, and shows in the code too.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from flash_attn_kernels import library

sys.path.insert(0, str(Path(__file__).parents[1]))

from build_support import bounded_spins, machine_code, ptxas, toolchain, warpgroup_code
from build_support.architectures import gencode_flags
from build_support.instantiations import instantiations
from build_support.machine_code import Instruction, Resources
from build_support.ninja_file import COMPILE_FLAGS
from build_support.warpgroup_code import BackwardExpected, Expected

ROOT = Path(__file__).parents[1]
UNITS = {Path(name).stem: text for name, text in instantiations() if name.startswith("sm90_")}
MANGLED_ELEMENTS = {"bf16": "13__nv_bfloat16", "fp16": "6__half"}
# forward_kernel<element, ForwardConfig<head dim, of v, consumers, columns, ...>, whether soft-capped>
KERNEL = re.compile(
    r"4sm9014forward_kernelI(?P<element>13__nv_bfloat16|6__half)NS0_13ForwardConfigI"
    r"Li(?P<head_dim>\d+)ELi(?P<head_dim_v>\d+)ELi(?P<consumers>\d+)ELi(?P<columns>\d+)E(?:L[ib]\d+E)*EE"
    r"Lb(?P<softcap>[01])EE"
)
# backward_kernel<element, BackwardConfig<head dim, queries of a tile>>
BACKWARD_KERNEL = re.compile(
    r"4sm9015backward_kernelI(?P<element>13__nv_bfloat16|6__half)NS0_14BackwardConfigI"
    r"Li(?P<head_dim>\d+)ELi(?P<rows>\d+)EEE"
)
# Kernels of the backward's units that use no tensor cores.
ROW_KERNELS = ("backward_delta_kernel", "backward_dq_kernel", "key_gradients_kernel")
# Copies to uniform registers that are left between score products, by head dim: of 16 pairs of descriptors not all are
# in uniform registers at once, and products that long hide a copy.
SCORE_COPIES = {256: 2}


def unit_of(kernel: str) -> str:
    """The unit that instantiates a kernel, by the kernel's mangled name."""
    found = KERNEL.search(kernel) or BACKWARD_KERNEL.search(kernel)
    assert found, f"{kernel} is no Hopper kernel that this test knows"
    element = next(name for name, mangled in MANGLED_ELEMENTS.items() if mangled == found["element"])
    if "rows" in found.groupdict():
        return f"sm90_backward_{element}_d{found['head_dim']}_{found['head_dim']}"
    kind = "softcap" if found["softcap"] == "1" else "plain"
    return f"sm90_forward_{element}_d{found['head_dim']}_{found['head_dim_v']}_{kind}"


def problems_of(kernel: str, code: list[Instruction], resources: Resources) -> list[str]:
    backward = BACKWARD_KERNEL.search(kernel)
    if backward:
        shape = BackwardExpected(head_dim=int(backward["head_dim"]), rows=int(backward["rows"]))
        return warpgroup_code.backward_problems(code, resources, shape)
    found = KERNEL.search(kernel)
    assert found
    numbers = {name: int(found[name]) for name in ("head_dim", "head_dim_v", "columns", "consumers")}
    expected = Expected(**numbers, score_copies=SCORE_COPIES.get(numbers["head_dim"], 0))
    return warpgroup_code.problems(code, resources, expected)


def is_row_kernel(kernel: str) -> bool:
    return any(name in kernel for name in ROW_KERNELS)


@pytest.fixture(scope="session")
def cuobjdump() -> Path:
    found = toolchain.find_cuobjdump()
    if found is None:
        pytest.skip("no cuobjdump in CUDA_HOME, beside nvcc, on PATH or among Triton's files")
    return found


def library_is_current() -> bool:
    if not library.LIBRARY_PATH.exists():
        return False
    sources = [*(ROOT / "csrc" / "attention").rglob("*.*"), *(ROOT / "csrc" / "ptx").iterdir()]
    return library.LIBRARY_PATH.stat().st_mtime >= max(source.stat().st_mtime for source in sources)


@pytest.fixture(scope="session")
def library_cubins(cuobjdump: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path] | None:
    """Of each unit the machine code in the library; None if that is older than its sources or there is none."""
    if not library_is_current():
        return None
    if b"a wait did not end" in library.LIBRARY_PATH.read_bytes():
        pytest.skip(f"the library was built with {bounded_spins.VARIABLE}=1")
    folder = tmp_path_factory.mktemp("cubins")
    cubins: dict[str, Path] = {}
    for cubin in machine_code.extract_cubins(cuobjdump, library.LIBRARY_PATH, "sm_90a", folder):
        for kernel in machine_code.resources(cuobjdump, cubin):
            if is_row_kernel(kernel):
                continue
            assert cubins.setdefault(unit_of(kernel), cubin) == cubin
    assert set(cubins) == set(UNITS)
    return cubins


@pytest.fixture
def compile_unit(tmp_path: Path) -> Callable[..., tuple[Path, str]]:
    """Compiles one unit alone and returns its machine code and what the compiler said."""

    def compile_it(unit: str, *flags: str) -> tuple[Path, str]:
        nvcc = toolchain.find_nvcc()
        if nvcc is None:
            pytest.skip("neither a compiled library that is newer than its sources nor nvcc")
        source, cubin = tmp_path / f"{unit}.cu", tmp_path / f"{unit}.cubin"
        source.write_text(UNITS[unit])
        gencode = gencode_flags(source, [])  # whatever the list says
        command = [
            nvcc,
            *COMPILE_FLAGS,
            *flags,
            f"-I{ROOT / 'csrc'}",
            *gencode,
            "-cubin",
            "-o",
            cubin,
            source,
        ]
        finished = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
        assert finished.returncode == 0, finished.stdout + finished.stderr
        return cubin, finished.stdout + finished.stderr

    return compile_it


@pytest.mark.parametrize("unit", UNITS)
def test_machine_code(
    unit: str,
    cuobjdump: Path,
    library_cubins: dict[str, Path] | None,
    compile_unit: Callable[..., tuple[Path, str]],
) -> None:
    if library_cubins is not None:
        cubin = library_cubins[unit]
    else:
        cubin, output = compile_unit(unit)
        assert ptxas.fatal_warnings(output) == []
        assert ptxas.forbidden_spills(ptxas.parse_report(output)) == []
    resources = machine_code.resources(cuobjdump, cubin)
    code = machine_code.instructions(cuobjdump, cubin)
    assert code and set(code) == set(resources)
    kernels = [kernel for kernel in code if not is_row_kernel(kernel)]
    assert kernels
    for kernel in kernels:
        assert unit_of(kernel) == unit
        assert problems_of(kernel, code[kernel], resources[kernel]) == [], kernel


def test_kernels_whose_waits_end_compile(
    cuobjdump: Path, compile_unit: Callable[..., tuple[Path, str]]
) -> None:
    cubin, output = compile_unit("sm90_forward_bf16_d64_64_plain", bounded_spins.FLAG)
    assert ptxas.fatal_warnings(output) == []
    assert any(
        instruction.opcode.startswith("ATOM") and "EXCH" in instruction.opcode
        for code in machine_code.instructions(cuobjdump, cubin).values()
        for instruction in code
    )


# What the checks find, on a small kernel: head dim 32, 48 of v, 32 keys a tile, 2 consumers.
SMALL = Expected(head_dim=32, head_dim_v=48, columns=32, consumers=2)
RESOURCES = Resources(registers=168, stack_bytes=0, local_bytes=0)
SCORES = "HGMMA.64x32x16.F32.BF16 R24, gdesc[UR28], R24"
OUTPUT = "HGMMA.64x48x16.F32.BF16 R88, R152, gdesc[UR16].tnspB, R88, gsb0"
EXPONENTIAL = "MUFU.EX2 R7, R7"
WAIT_SCORES, WAIT_OUTPUT = "WARPGROUP.DEPBAR.LE gsb0, 0x1", "WARPGROUP.DEPBAR.LE gsb0, 0x0"
PROLOGUE = ["USETMAXREG.DEALLOC.CTAPOOL 0x28", "USETMAXREG.TRY_ALLOC.CTAPOOL UP0, 0xe8", SCORES, WAIT_OUTPUT]
LOOP = [SCORES, SCORES, "R2UR UR4, R4", OUTPUT, OUTPUT, WAIT_SCORES, *[EXPONENTIAL] * 18, WAIT_OUTPUT]


def problems(
    prologue: list[str] = PROLOGUE, loop: list[str] = LOOP, resources: Resources = RESOURCES
) -> list[str]:
    """Of the loop between a prologue and an epilogue, in a persistent kernel's loop over tiles."""
    texts = [*prologue, *loop, f"@P0 BRA 0x{16 * len(prologue):x}", OUTPUT, WAIT_OUTPUT, "@!P1 BRA 0x10"]
    lines = [f"        /*{16 * i:04x}*/    {text} ;   /* 0x00 */" for i, text in enumerate(texts)]
    listing = "\n".join(["\tcode for sm_90a", "\t\tFunction : _Zkernel", *lines, "\t\t....."])
    return warpgroup_code.problems(machine_code.parse_instructions(listing)["_Zkernel"], resources, SMALL)


def test_good_code_has_no_problem() -> None:
    assert problems() == []


def test_softmax_behind_the_second_wait_is_found() -> None:
    moved = [*LOOP[:6], *[EXPONENTIAL] * 14, WAIT_OUTPUT, *[EXPONENTIAL] * 4]
    assert problems(loop=moved) == [
        "14 of 18 exponentials are between the waits: the softmax does not run under a product"
    ]
    assert problems(loop=[*LOOP[:6], *[EXPONENTIAL] * 15, WAIT_OUTPUT, *[EXPONENTIAL] * 3]) == []
    assert "0 exponentials in the main loop" in problems(loop=[*LOOP[:6], WAIT_OUTPUT])[0]


def test_copies_between_products_are_found() -> None:
    copy = LOOP[2]
    assert problems(loop=[SCORES, copy, *LOOP[1:]]) == ["1 R2UR between the products for scores, 0 expected"]
    assert problems(loop=[*LOOP[:4], copy, *LOOP[4:]]) == [
        "1 R2UR between the products for output, 0 expected"
    ]


@pytest.mark.parametrize(
    "loop",
    [
        [*LOOP[:1], WAIT_OUTPUT, *LOOP[1:]],  # as C7510 warns
        [*LOOP[:5], *LOOP[6:]],
        [*LOOP[:5], WAIT_OUTPUT, *LOOP[6:]],
        [SCORES, *LOOP],
        [OUTPUT, OUTPUT, SCORES, SCORES, *LOOP[5:]],
    ],
)
def test_other_orders_are_found(loop: list[str]) -> None:
    assert any(
        "2 products for scores, 2 for the output, wait 1, wait 0" in problem
        for problem in problems(loop=loop)
    )


def test_other_shapes_are_found() -> None:
    wider = SCORES.replace("x32x", "x48x")
    assert problems(loop=[wider, *LOOP[1:]]) == [f"a product for scores is not 32 wide: {wider}"]


# The same of a backward: head dim 32, 64 queries and 32 keys a tile.
SMALL_BACKWARD = BackwardExpected(head_dim=32, rows=64, columns=32)
BACKWARD_SCORES = "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR28], R24"
BACKWARD_KEYS = "HGMMA.64x32x16.F32.BF16 R88, R152, gdesc[UR16].tnspB, R88, gsb0"
BACKWARD_LOOP = [
    *[BACKWARD_SCORES] * 2, "R2UR UR4, R4", *[BACKWARD_SCORES] * 2, WAIT_SCORES, EXPONENTIAL, WAIT_OUTPUT,
    *[BACKWARD_KEYS] * 4, *[BACKWARD_SCORES] * 2, WAIT_SCORES, *[BACKWARD_KEYS] * 4, WAIT_SCORES, WAIT_OUTPUT,
]  # fmt: skip


def backward_problems(loop: list[str]) -> list[str]:
    texts = [*PROLOGUE[:2], *loop, f"@P0 BRA 0x{16 * 2:x}", "@!P1 BRA 0x10"]
    lines = [f"        /*{16 * i:04x}*/    {text} ;   /* 0x00 */" for i, text in enumerate(texts)]
    listing = "\n".join(["\tcode for sm_90a", "\t\tFunction : _Zkernel", *lines, "\t\t....."])
    code = machine_code.parse_instructions(listing)["_Zkernel"]
    return warpgroup_code.backward_problems(code, RESOURCES, SMALL_BACKWARD)


def test_what_is_wrong_with_a_backward_is_found() -> None:
    assert backward_problems(BACKWARD_LOOP) == []
    assert "the main loop is not" in backward_problems([*BACKWARD_LOOP[:-1], EXPONENTIAL])[0]
    serialised = [*BACKWARD_LOOP[:9], WAIT_OUTPUT, *BACKWARD_LOOP[9:]]
    assert "the main loop is not" in backward_problems(serialised)[0]
    copied = [*BACKWARD_LOOP[:9], "R2UR UR4, R4", *BACKWARD_LOOP[9:]]
    assert backward_problems(copied) == ["an R2UR behind 5 of the main loop's products: R2UR UR4, R4"]
    assert "1 accesses to local memory" in backward_problems(["STL [R1], R4", *BACKWARD_LOOP])[0]
    missing = backward_problems(BACKWARD_LOOP[:5])
    assert missing == ["no loop computes products from shared memory and from registers"]


@pytest.mark.parametrize("missing", ["scores", "output"])
def test_a_missing_loop_is_found(missing: str) -> None:
    other = {"scores": OUTPUT, "output": SCORES}[missing]
    prologue = [text for text in PROLOGUE if text != SCORES] if missing == "scores" else PROLOGUE
    loop = [other if text in (SCORES, OUTPUT) else text for text in LOOP]
    if missing == "scores":
        assert problems(prologue=prologue, loop=loop) == ["no loop computes both products"]
    else:  # the loop over tiles is taken, whose epilogue has an output product
        assert problems(loop=loop)


def test_missing_fences_are_found() -> None:
    """Between stores to a tile and the barrier behind them; words that describe works need none."""
    store, fence, barrier = "STS.128 [R12], RZ", "FENCE.VIEW.ASYNC.S", "BAR.SYNC.DEFER_BLOCKING R11, 0x80"
    assert problems(prologue=[*PROLOGUE, store, store, fence, barrier, "STS [R8+0x308], R3", barrier]) == []
    for unfenced in ([store, barrier], [fence, store, barrier, fence], [store, fence, store, barrier]):
        assert problems(prologue=[*PROLOGUE, *unfenced]) == [f"no fence between {store} and {barrier}"]
    matrices, arrival = "STSM.16.MT88.4 [R18], R56", "BAR.ARV R19, 0xa0"
    assert backward_problems([*BACKWARD_LOOP, matrices, fence, arrival]) == []
    assert backward_problems([*BACKWARD_LOOP, matrices, arrival]) == [
        f"no fence between {matrices} and {arrival}"
    ]


def test_local_memory_is_found() -> None:
    assert problems(prologue=["@P1 STL.64 [R1+0x8], R4", *PROLOGUE]) == [
        "1 accesses to local memory, such as STL.64 [R1+0x8], R4"
    ]
    assert problems(loop=[*LOOP, "LDL R4, [R1]"]) == ["1 accesses to local memory, such as LDL R4, [R1]"]
    assert problems(resources=replace(RESOURCES, stack_bytes=16)) == ["16 bytes of stack, 0 of local memory"]


def test_registers_are_checked() -> None:
    assert problems(resources=replace(RESOURCES, registers=128)) == ["128 registers at launch instead of 168"]
    assert "setmaxnreg is ignored" in problems(prologue=PROLOGUE[1:])[0]
    greedy = [PROLOGUE[0], PROLOGUE[1].replace("0xe8", "0xf0"), *PROLOGUE[2:]]
    assert problems(prologue=greedy) == ["2 x 240 + 40 registers are more than the 504 launched"]
