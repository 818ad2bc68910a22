"""Builds the CUDA library of flash-attn-kernels; used by the wheel's build hook and by tools/build_ext.py.

- decision: whether to compile, from FLASH_ATTN_KERNELS_BUILD and the machine
- toolchain: nvcc, host compiler, torch's headers and library, ninja
- architectures: FLASH_ATTN_KERNELS_ARCHS -> nvcc's -gencode flags
- instantiations: the generated translation units, a few kernel configurations each
- ninja_file: sources -> build.ninja
- compile_one: runs one nvcc, recording its time, memory and ptxas report
- ptxas: registers, shared memory and spills of every kernel; what fails the build
- report: what a build cost and made
- library: all of the above in order
- bounded_spins: FLASH_ATTN_KERNELS_BOUNDED_SPINS, a build in which no wait is endless
- machine_code, warpgroup_code: for tests, what the machine code of the Hopper kernels looks like
- platform_tag: the wheel's platform tag, from the symbol versions that the library needs
"""
