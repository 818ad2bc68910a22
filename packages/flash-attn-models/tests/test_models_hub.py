"""Names to folders, without a network: a cache on disk as huggingface_hub lays it out, and its answers replaced."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from flash_attn_models import from_pretrained
from flash_attn_models.gpt.families import FAMILIES
from flash_attn_models.gpt.repositories import REPOSITORIES
from flash_attn_models.hub import find_folder

huggingface_hub = pytest.importorskip("huggingface_hub")
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def cached(hub, repository, write, commit=COMMIT, ref="main"):
    """A repository in the cache; ``write`` fills the folder of its files."""
    place = hub / f"models--{repository.replace('/', '--')}"
    (place / "refs").mkdir(parents=True, exist_ok=True)
    (place / "refs" / ref).write_text(commit)
    folder = place / "snapshots" / commit
    folder.mkdir(parents=True)
    write(folder)
    return folder


def as_bin(hf_model):
    def write(folder):
        hf_model.config.save_pretrained(folder)
        torch.save(hf_model.state_dict(), folder / "pytorch_model.bin")

    return write


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_a_cached_repository_loads_offline(make_hf_model, tmp_path, form):
    hf_model = make_hf_model("gpt2", {})
    cached(tmp_path, "owner/name", hf_model.save_pretrained if form == "safetensors" else as_bin(hf_model))
    model = from_pretrained("owner/name", cache_dir=tmp_path, local_files_only=True)
    input_ids = torch.randint(131, (2, 9))
    with torch.no_grad():
        assert (model(input_ids) - hf_model(input_ids).logits).abs().max() < 1e-4


def test_environment_variables_are_honoured(make_hf_model, tmp_path):
    """In a new process: HF_HOME says where, HF_HUB_OFFLINE that nobody is asked, and a size's name is enough."""
    cached(tmp_path / "hub", "openai-community/gpt2", make_hf_model("gpt2", {}).save_pretrained)
    code = "import flash_attn_models as m; print(m.from_pretrained('gpt2').config.vocab_size)"
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    environment.pop("HF_HUB_CACHE", None)
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment,
        check=False,
    )
    assert result.stdout.strip() == "131", result.stdout + result.stderr


def test_revisions_are_different_models(make_hf_model, tmp_path):
    cached(tmp_path, "owner/name", make_hf_model("gpt2", {}).save_pretrained)
    other = make_hf_model("gpt2", {"vocab_size": 257})
    cached(tmp_path, "owner/name", other.save_pretrained, commit="f" * 40, ref="other")
    options = {"cache_dir": tmp_path, "local_files_only": True}
    assert from_pretrained("owner/name", **options).config.vocab_size == 131
    assert from_pretrained("owner/name", revision="other", **options).config.vocab_size == 257
    with pytest.raises(FileNotFoundError, match="owner/name at revision 'third': not in the cache"):
        from_pretrained("owner/name", revision="third", **options)


def test_not_in_the_cache(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"not in the cache, and downloads are off.*Fix: load it once"
    ):
        from_pretrained("owner/name", cache_dir=tmp_path, local_files_only=True)
    cached(tmp_path, "owner/half", lambda folder: (folder / "config.json").write_text("{}"))
    with pytest.raises(FileNotFoundError, match="owner/half: "):
        from_pretrained("owner/half", cache_dir=tmp_path, local_files_only=True)


class Hub:
    """In place of ``snapshot_download``: files by name, of which it gives those that are asked for."""

    def __init__(self, folder, files):
        self.folder, self.files, self.calls = folder, files, []

    def __call__(self, repository, *, allow_patterns, **options):
        from fnmatch import fnmatch

        self.calls.append((repository, options))
        self.folder.mkdir(exist_ok=True)
        for name in self.files:
            if any(fnmatch(name, pattern) for pattern in allow_patterns):
                (self.folder / name).write_text("{}")
        return str(self.folder)


def names(folder):
    return {path.name for path in folder.iterdir()}


def test_safetensors_come_first_and_never_both(tmp_path, monkeypatch):
    wanted = {"config.json", "generation_config.json", "model.safetensors"}
    hub = Hub(tmp_path / "a", [*wanted, "pytorch_model.bin", "consolidated.safetensors", "README.md"])
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    assert names(find_folder("owner/name")) == wanted
    hub = Hub(tmp_path / "b", ["config.json", "pytorch_model.bin", "tf_model.h5"])
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    folder = find_folder("owner/name", revision="v1", token="secret", cache_dir=tmp_path)
    assert names(folder) == {"config.json", "pytorch_model.bin"}
    expected = {"revision": "v1", "token": "secret", "cache_dir": tmp_path, "local_files_only": False}
    assert hub.calls == [("owner/name", expected)] * 2
    shards = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    hub = Hub(tmp_path / "c", ["config.json", "model.safetensors.index.json", *shards])
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    assert names(find_folder("llama-3.2-1b")) == {*shards, "config.json", "model.safetensors.index.json"}
    assert hub.calls[0][0] == "meta-llama/Llama-3.2-1B"


def test_a_repository_without_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", Hub(tmp_path / "a", ["config.json", "x.gguf"]))
    with pytest.raises(
        ValueError, match=r"name_or_folder: got 'owner/name', which holds config.json; expected"
    ):
        find_folder("owner/name")


def refusal(kind):
    """An answer of the hub, built as in every version of huggingface_hub."""
    error = getattr(huggingface_hub.errors, kind)
    return error.__new__(error)


@pytest.mark.parametrize(
    ("kind", "expected", "message"),
    [
        ("GatedRepoError", PermissionError, "owner/name: a repository that one must ask for. Fix: accept"),
        (
            "RepositoryNotFoundError",
            ValueError,
            "name_or_folder: got 'owner/name'; expected a repository that",
        ),
        (
            "RevisionNotFoundError",
            ValueError,
            "revision: got 'v9'; expected a branch, tag or commit of owner/name",
        ),
        (
            "LocalEntryNotFoundError",
            FileNotFoundError,
            "neither in the cache nor can the hub be reached. Fix",
        ),
    ],
)
def test_refusals_of_the_hub(monkeypatch, kind, expected, message):
    def refuse(*_, **__):
        raise refusal(kind)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(expected, match=message):
        find_folder("owner/name", revision="v9")


def test_names_that_are_neither(tmp_path):
    with pytest.raises(ValueError, match=r"name_or_folder: got 'gpt2-xll'.*did you mean 'gpt2-xl'"):
        find_folder("gpt2-xll")
    for name in ("a/b/c", "./missing/folder", "", "-x", "owner/name with spaces"):
        with pytest.raises(
            ValueError, match=r"name_or_folder: got .*; expected a local folder, a repository"
        ):
            find_folder(name)
    file = tmp_path / "model.bin"
    file.write_text("")
    with pytest.raises(ValueError, match="name_or_folder: got"):
        find_folder(file)
    with pytest.raises(ValueError, match="revision: got a value beside a local folder"):
        find_folder(tmp_path, revision="main")


def test_a_local_folder_comes_first(make_hf_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_hf_model("gpt2", {"vocab_size": 257}).save_pretrained(tmp_path / "gpt2")
    assert from_pretrained("gpt2").config.vocab_size == 257


def test_every_size_has_a_repository():
    assert REPOSITORIES.keys() == {size for family in FAMILIES.values() for size in family.sizes}
    assert all(repository.count("/") == 1 for repository in REPOSITORIES.values())
