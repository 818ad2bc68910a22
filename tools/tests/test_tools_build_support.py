from __future__ import annotations

import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from build_support import bounded_spins, decision, library, ninja_file, platform_tag, ptxas, toolchain
from build_support.architectures import gencode_flags, requested_architectures
from build_support.compile_one import keep_inside
from build_support.errors import BuildError
from build_support.instantiations import DECODE_HEAD_DIMS, HEAD_DIMS, SM90_BACKWARD_HEAD_DIMS, instantiations

PTXAS_OUTPUT = """
ptxas info    : 28 bytes gmem, 224 bytes cmem[4]
ptxas info    : Compiling entry function '_Z5firstPf' for 'sm_80'
ptxas info    : Function properties for _Z5firstPf
    16 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 16 bytes cumulative stack size, 512 bytes smem
ptxas info    : Compile time = 2.371 ms
ptxas info    : Compiling entry function '_Z6secondPf' for 'sm_90'
ptxas info    : Function properties for _Z6secondPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 0 barriers, 360 bytes cmem[0]
"""


def test_ptxas_report_is_read() -> None:
    first, second = ptxas.parse_report(PTXAS_OUTPUT)
    assert (first.name, first.architecture, first.registers) == ("_Z5firstPf", "sm_80", 255)
    assert (first.static_shared_bytes, first.stack_bytes) == (512, 16)
    assert (first.spill_store_bytes, first.spill_load_bytes) == (8, 4)
    assert (second.registers, second.static_shared_bytes, second.spills) == (40, 0, False)
    assert ptxas.forbidden_spills([first, second]) == [first]
    assert "first(float*)" in ptxas.table([first, second]) or "_Z5firstPf" in ptxas.table([first, second])


def test_spills_are_allowed_by_name_and_amount() -> None:
    name = (
        "void flash_attn::sm80::backward_kernel<__half, flash_attn::sm80::BackwardConfig<64, 64, 64, 64> >()"
    )

    def kernel(name: str, spilled_bytes: int) -> ptxas.Kernel:
        return ptxas.Kernel(name, "sm_90", 255, 0, spilled_bytes, spilled_bytes, spilled_bytes)

    assert ptxas.forbidden_spills([kernel(name, 0), kernel(name, 80), kernel("void other()", 0)]) == []
    much, other = kernel(name, 84), kernel("void other()", 4)
    assert ptxas.forbidden_spills([much, other]) == [much, other]


@pytest.mark.parametrize(
    ("code", "fatal"), [("C7503", 0), ("C7504", 1), ("C7510", 1), ("C7515", 1), ("C7516", 0)]
)
def test_fatal_ptxas_warnings(code: str, fatal: int) -> None:
    output = (
        f"ptxas info    : ({code}) Potential Performance Loss: wgmma.mma_async instructions are serialized"
    )
    assert len(ptxas.fatal_warnings(PTXAS_OUTPUT + output)) == fatal


def test_architecture_lists() -> None:
    assert gencode_flags(Path("a.cu"), requested_architectures("80;90+PTX")) == [
        "-gencode",
        "arch=compute_80,code=sm_80",
        "-gencode",
        "arch=compute_90,code=[sm_90,compute_90]",
    ]
    for hopper in ("../csrc/attention/sm90/x.cu", "generated/sm90_forward_bf16_d64_64_plain.cu"):
        flags = gencode_flags(Path(hopper), requested_architectures("80"))
        assert flags == ["-gencode", "arch=compute_90a,code=sm_90a"]
    for other in ("../csrc/api/attention_sm90.cu", "generated/sm80_forward_bf16_d64_64_plain.cu"):
        flags = gencode_flags(Path(other), requested_architectures("80"))
        assert flags == ["-gencode", "arch=compute_80,code=sm_80"]


def test_every_variant_is_instantiated_once() -> None:
    units = dict(instantiations())
    assert len(units) == len(list(instantiations())) == 2 * 2 * 9 + 2 * 2 * 6 + 2 * 2 + 2 * 3
    for head_dim, head_dim_v in HEAD_DIMS:
        for kind, softcap in (("plain", "false"), ("softcap", "true")):
            for name, element in (("bf16", "__nv_bfloat16"), ("fp16", "__half")):
                assert units[f"sm90_forward_{name}_d{head_dim}_{head_dim_v}_{kind}.cu"] == (
                    '#include "attention/sm90/forward_launch.cuh"\n\nnamespace flash_attn::sm90 {\n'
                    f"template void launch_forward<{element}, HeadDims<{head_dim}, {head_dim_v}>, {softcap}>"
                    "(const ForwardParams&, int*, const LaunchTarget&);\n}\n"
                )
    assert "Variant<192, 128, false>" in units["sm80_backward_fp16_d192_128_plain.cu"]
    assert "Variant<256, 256, true>" in units["sm80_forward_bf16_d256_256_general.cu"]
    assert "launch_backward<__half, HeadDims<128, 128>>" in units["sm90_backward_fp16_d128_128.cu"]
    assert "launch_decode<__half, 256>" in units["decode_fp16_d256.cu"]


def test_instantiations_are_those_that_the_headers_choose_from() -> None:
    csrc = Path(__file__).parents[2] / "packages" / "flash-attn-kernels" / "csrc" / "attention"
    found = re.findall(r"return function\(HeadDims<(\d+), (\d+)>", (csrc / "head_dims.h").read_text())
    assert tuple((int(head_dim), int(head_dim_v)) for head_dim, head_dim_v in found) == HEAD_DIMS
    found = re.findall(
        r"struct BackwardConfigOf<HeadDims<(\d+), (\d+)>>", (csrc / "sm90" / "backward_config.h").read_text()
    )
    assert (
        tuple((int(head_dim), int(head_dim_v)) for head_dim, head_dim_v in found) == SM90_BACKWARD_HEAD_DIMS
    )
    found = re.findall(r"struct DecodeConfigs<(\d+)>", (csrc / "decode" / "config.h").read_text())
    assert tuple(int(head_dim) for head_dim in found) == DECODE_HEAD_DIMS


@pytest.mark.parametrize("wrong", ["75", "sm_80", "80,90", "80;", "native"])
def test_wrong_architecture_lists_are_refused(wrong: str) -> None:
    with pytest.raises(BuildError, match=r"FLASH_ATTN_KERNELS_ARCHS: got .* expected numbers >= 80"):
        requested_architectures(wrong)


def test_decision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decision, "has_nvidia_gpu", lambda: False)
    assert not decision.decide("auto").compile
    assert "FLASH_ATTN_KERNELS_BUILD=always" in decision.decide("auto").reason
    assert decision.decide("always").compile
    monkeypatch.setattr(decision, "has_nvidia_gpu", lambda: True)
    assert decision.decide("auto").compile
    assert not decision.decide("never").compile
    monkeypatch.setenv(decision.VARIABLE, "yes")
    with pytest.raises(BuildError, match="FLASH_ATTN_KERNELS_BUILD: got 'yes', expected one of auto"):
        decision.decide()


def test_build_requirements_name_the_compiler_only_where_there_is_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(toolchain, "find_nvcc", lambda: Path("/cuda/bin/nvcc"))
    assert not any("nvcc" in requirement for requirement in toolchain.build_requirements())
    monkeypatch.setattr(toolchain, "find_nvcc", lambda: None)
    assert any(requirement.startswith("nvidia-cuda-nvcc") for requirement in toolchain.build_requirements())


def test_old_compilers_are_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fake_nvcc(name: str, version: str) -> Path:
        nvcc = tmp_path / name / "bin" / "nvcc"
        nvcc.parent.mkdir(parents=True)
        nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release x, V{version}'\n")
        nvcc.chmod(0o755)
        return nvcc

    old, new = fake_nvcc("old", "12.4.131"), fake_nvcc("new", "13.1.0")
    monkeypatch.setenv("CUDA_HOME", str(old.parents[1]))
    monkeypatch.setenv("PATH", f"{new.parent}:/usr/bin:/bin")
    assert toolchain.find_nvcc() == new


def test_cuobjdump_is_looked_for_where_nvcc_is_and_among_tritons_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fake_tool(name: str) -> Path:
        tool = tmp_path / name / "bin" / "cuobjdump"
        tool.parent.mkdir(parents=True)
        tool.write_text("#!/bin/sh\n")
        tool.chmod(0o755)
        return tool

    home, beside, on_path = fake_tool("home"), fake_tool("nvcc"), fake_tool("path")
    monkeypatch.setattr(toolchain, "find_nvcc", lambda: beside.with_name("nvcc"))
    monkeypatch.setattr(toolchain, "_cuda_home", lambda nvcc: nvcc.parents[1])
    monkeypatch.setenv("CUDA_HOME", str(home.parents[1]))
    monkeypatch.setenv("PATH", str(on_path.parent))
    for found in (home, beside, on_path):
        assert toolchain.find_cuobjdump() == found
        found.unlink()
    triton = tmp_path / "triton" / "backends" / "nvidia"
    fake_tool("triton/backends/nvidia")
    monkeypatch.setattr(
        toolchain.importlib.util, "find_spec", lambda name: SimpleNamespace(origin=f"{tmp_path}/{name}/x.py")
    )
    assert toolchain.find_cuobjdump() == triton / "bin" / "cuobjdump"
    monkeypatch.setattr(toolchain.importlib.util, "find_spec", lambda name: None)
    assert toolchain.find_cuobjdump() is None


def test_manylinux_minor_covers_glibc_and_the_compiler_runtime() -> None:
    assert platform_tag.manylinux_minor(["GLIBC_2.2.5", "GLIBC_2.14"]) == 17
    assert platform_tag.manylinux_minor(["GLIBC_2.34", "GLIBCXX_3.4.11"]) == 34
    assert platform_tag.manylinux_minor(["GLIBC_2.17", "GLIBCXX_3.4.30"]) == 35
    assert platform_tag.manylinux_minor(["CXXABI_1.3.15"]) == 39
    with pytest.raises(BuildError, match="newer than every known platform tag"):
        platform_tag.manylinux_minor(["GLIBCXX_3.4.99"])
    with pytest.raises(BuildError, match=r"OPENSSL_3\.0\.0"):
        platform_tag.manylinux_minor(["OPENSSL_3.0.0"])


def test_needed_versions_of_a_real_library() -> None:
    torch_library = Path(
        sys.modules["torch"].__file__ if "torch" in sys.modules else __import__("torch").__file__
    )
    versions = platform_tag.needed_versions(torch_library.parent / "lib" / "libc10.so")
    assert any(version.startswith("GLIBC_2.") for version in versions)
    assert any(version.startswith("GLIBCXX_3.4") for version in versions)


def test_generated_sources_change_only_when_their_text_does(tmp_path: Path) -> None:
    units = ninja_file.write_generated_units(tmp_path, [("a.cu", "// a"), ("b.cu", "// b")])
    assert [str(unit.object) for unit in units] == ["objects/generated/a.o", "objects/generated/b.o"]
    times = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "generated").iterdir()}
    ninja_file.write_generated_units(tmp_path, [("a.cu", "// a"), ("c.cu", "// c")])
    after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "generated").iterdir()}
    assert set(after) == {"a.cu", "c.cu"}
    assert after["a.cu"] == times["a.cu"]


def write_ninja_file(folder: Path, *, bounded_spins: bool) -> dict[str, str]:
    """The flags of each of three units, by its source."""
    sources = ["generated/sm90_forward.cu", "generated/sm80_forward.cu", "../csrc/api/attention_sm90.cu"]
    units = [ninja_file.TranslationUnit(Path(source), Path(source).with_suffix(".o")) for source in sources]
    architectures = requested_architectures("80")
    ninja_file.write_ninja_file(folder, folder, units, architectures, "stamp", bounded_spins=bounded_spins)
    text = (folder / "build.ninja").read_text()
    assert "nvcc $flags $unit_flags -c $in" in text
    return dict(re.findall(r"^build \S+: compile (\S+)\n  unit_flags = (.*)$", text, re.MULTILINE))


def test_bounded_spins_change_the_command_of_the_hopper_kernels(tmp_path: Path) -> None:
    without = write_ninja_file(tmp_path, bounded_spins=False)
    bounded = write_ninja_file(tmp_path, bounded_spins=True)
    assert len(without) == 3 and not any("BOUNDED_SPINS" in flags for flags in without.values())
    changed = {source: flags for source, flags in bounded.items() if flags != without[source]}
    hopper = "generated/sm90_forward.cu"
    assert changed == {hopper: without[hopper] + " -DFLASH_ATTN_BOUNDED_SPINS"}
    header = Path(ninja_file.__file__).parents[1] / "csrc" / "ptx" / "spin_limit.cuh"
    assert "#ifdef FLASH_ATTN_BOUNDED_SPINS\n" in header.read_text()


@pytest.mark.parametrize(("value", "requested"), [("", False), ("0", False), ("1", True)])
def test_bounded_spins_are_asked_for_by_name(
    monkeypatch: pytest.MonkeyPatch, value: str, requested: bool
) -> None:
    monkeypatch.setenv(bounded_spins.VARIABLE, value)
    assert bounded_spins.bounded_spins_requested() is requested


def test_wrong_values_of_bounded_spins_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(bounded_spins.VARIABLE, "yes")
    with pytest.raises(BuildError, match="FLASH_ATTN_KERNELS_BOUNDED_SPINS: got 'yes', expected 0 or 1"):
        bounded_spins.bounded_spins_requested()


def test_spills_are_fatal_unless_spins_are_bounded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(BuildError, match="register spills"):
        library._check_kernels(tmp_path, [PTXAS_OUTPUT], spills_are_fatal=True)
    kernels = library._check_kernels(tmp_path, [PTXAS_OUTPUT], spills_are_fatal=False)
    assert len(kernels) == 2
    assert "8 bytes stored, 4 loaded" in capsys.readouterr().err
    serialised = PTXAS_OUTPUT + "ptxas info    : (C7510) Potential Performance Loss: wgmma is serialized"
    with pytest.raises(BuildError, match="C7510"):
        library._check_kernels(tmp_path, [serialised], spills_are_fatal=False)


def test_dependency_files_keep_what_is_inside(tmp_path: Path) -> None:
    depfile = tmp_path / "x.o.d"
    depfile.write_text(
        "objects/x.o : ../csrc/x.cu \\\n    toolchain/cuda/include/a.h \\\n    ../csrc/api/../b.h\n"
    )
    keep_inside(depfile, ["../csrc", "generated"])
    assert depfile.read_text() == "objects/x.o : ../csrc/x.cu ../csrc/api/../b.h\n"


def test_job_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAX_JOBS", "7")
    assert library.job_count() == 7
    monkeypatch.setenv("MAX_JOBS", "many")
    with pytest.raises(BuildError, match="MAX_JOBS: got 'many'"):
        library.job_count()
    monkeypatch.delenv("MAX_JOBS")
    monkeypatch.setattr(library, "_available_memory_bytes", lambda: 4 * 2**30)
    assert library.job_count() == 1
