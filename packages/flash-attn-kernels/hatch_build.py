"""Hatchling's build hook: compiles the CUDA library into the wheel where compiling is wanted."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

sys.path.insert(0, str(Path(__file__).parent))

from build_support.decision import decide
from build_support.errors import BuildError
from build_support.toolchain import build_requirements


class KernelBuildHook(BuildHookInterface):
    """Leaves the wheel pure (py3-none-any) unless build_support.decision says to compile."""

    def dependencies(self) -> list[str]:
        return build_requirements() if decide().compile else []

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        decision = decide()
        if not decision.compile:
            self.app.display_warning(f"flash-attn-kernels: {decision.reason}")
            return
        from build_support.library import build  # these need what dependencies() asked for
        from build_support.platform_tag import platform_tag

        self.app.display_info(f"flash-attn-kernels: compiling CUDA kernels ({decision.reason})")
        try:
            built = build(Path(self.root))
        except BuildError as error:
            self.app.abort(
                f"flash-attn-kernels: {error}\n(FLASH_ATTN_KERNELS_BUILD=never installs without kernels)"
            )
        self.app.display_info(built.report.summary())
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{platform_tag(built.path)}"
        # Named here because git ignores it and the wheel excludes it otherwise.
        build_data["artifacts"].append(f"/{built.path.relative_to(self.root)}")
