"""What identifies a model's content, wherever it is on disk."""

from pathlib import Path

import pytest

from worker.model import identity

CONFIG, WEIGHTS = "config.json", "model.safetensors"


def folder(path: Path, config: str = "{}", size: int = 10) -> Path:
    path.mkdir(parents=True)
    (path / CONFIG).write_text(config)
    (path / WEIGHTS).write_bytes(bytes(size))
    return path


def test_a_snapshot_has_its_commit(tmp_path: Path) -> None:
    snapshot = folder(tmp_path / "hub/models--org--m/snapshots/abc")
    assert identity.of_folder(snapshot) == "abc"
    assert identity.of_folder(snapshot / "sub/model.gguf") == "abc/sub/model.gguf"


def test_another_folder_is_identified_by_its_content_and_not_by_its_path(tmp_path: Path) -> None:
    first = identity.of_folder(folder(tmp_path / "a/snapshots/abc"))
    assert first == identity.of_folder(folder(tmp_path / "b"))
    assert first.startswith("hash ")
    assert first != identity.of_folder(folder(tmp_path / "c", size=11))
    assert first != identity.of_folder(folder(tmp_path / "d", config='{"a": 1}'))


@pytest.mark.parametrize("size", [0, 10])
def test_a_file_is_identified_by_its_name_and_size(tmp_path: Path, size: int) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(bytes(size))
    assert identity.of_folder(file).startswith("hash ")
