"""Under which name a run is known to a tracking server, so that a resumed one continues its record there."""

from __future__ import annotations

import json
from pathlib import Path

from flash_attn_train.atomic import atomic_write


class Identities:
    """Names of a run at its servers, in a file of the run folder."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def get(self, server: str) -> str | None:
        return self._read().get(server)

    def put(self, server: str, identity: str) -> None:
        if self.get(server) != identity:
            with atomic_write(self.file) as file:
                file.write((json.dumps({**self._read(), server: identity}, indent=2) + "\n").encode())

    def _read(self) -> dict[str, str]:
        return json.loads(self.file.read_text()) if self.file.exists() else {}
