from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from build_support import decision, library, ninja_file, platform_tag, ptxas, toolchain
from build_support.architectures import gencode_flags, requested_architectures
from build_support.compile_one import keep_inside
from build_support.errors import BuildError
from build_support.instantiations import HEAD_DIMS, instantiations

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
    assert len(units) == len(list(instantiations())) == 2 * 2 * 9 + 2 * 2 * 6
    for head_dim, head_dim_v in HEAD_DIMS:
        for kind, softcap in (("plain", "false"), ("softcap", "true")):
            for name, element in (("bf16", "__nv_bfloat16"), ("fp16", "__half")):
                assert units[f"sm90_forward_{name}_d{head_dim}_{head_dim_v}_{kind}.cu"] == (
                    '#include "attention/sm90/forward_launch.cuh"\n\nnamespace flash_attn::sm90 {\n'
                    f"template void launch_forward<{element}, HeadDims<{head_dim}, {head_dim_v}>, {softcap}>"
                    "(const ForwardParams&, int*, int, cudaStream_t);\n}\n"
                )
    assert "Variant<192, 128, false>" in units["sm80_backward_fp16_d192_128_plain.cu"]
    assert "Variant<256, 256, true>" in units["sm80_forward_bf16_d256_256_general.cu"]


def test_instantiations_are_those_that_the_headers_choose_from() -> None:
    csrc = Path(__file__).parents[2] / "packages" / "flash-attn-kernels" / "csrc" / "attention"
    found = re.findall(r"return function\(HeadDims<(\d+), (\d+)>", (csrc / "head_dims.h").read_text())
    assert tuple((int(head_dim), int(head_dim_v)) for head_dim, head_dim_v in found) == HEAD_DIMS


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
