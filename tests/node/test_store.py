from __future__ import annotations

import errno
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from node import manifest as manifests
from node.errors import TandemError, UserError
from node.info import Manifest, StoredFile
from node.manifest import check_files, digest, manifest_of
from node.store import Absent, NoRoom, Store, WrongDigest
from tests.fixtures.stores import described, model_folder

GIGABYTE = 1 << 30


@pytest.fixture(autouse=True)
def no_hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    cache = tmp_path / "hub"
    monkeypatch.setenv("HF_HUB_CACHE", str(cache))
    return cache


def put(store: Store, file: StoredFile, content: bytes) -> None:
    arriving = store.begin(file)
    assert arriving is not None
    while arriving.resume():
        pass
    arriving.write(content[arriving.offset :])
    arriving.finish()


def fill(store: Store, manifest: Manifest, folder: Path) -> str:
    for file in store.missing(manifest.files):
        put(store, file, (folder / file.name).read_bytes())
    return store.save(manifest)


def test_a_manifest_names_what_loading_needs_and_nothing_else(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "m", sizes=(10,))
    for name in (
        "consolidated.safetensors",
        "adapter_config.json",
        "README.md",
        "train.jsonl",
        "modeling.py",
        ".x.json",
    ):
        (folder / name).write_text("x")
    (folder / "chat_template.jinja").write_text("x")
    names = [file.name for file in described(folder).files]
    assert names == ["chat_template.jinja", "config.json", "model-00001-of-00001.safetensors", "tokenizer.json"]
    with_code = manifest_of(folder, "m", "", tmp_path / "cache.json", with_code=True)
    assert "modeling.py" in [file.name for file in with_code.files]


def test_the_digest_of_a_manifest_does_not_depend_on_what_people_call_the_model(tmp_path: Path) -> None:
    found = described(model_folder(tmp_path / "m", sizes=(10,)))
    other = Manifest("another/name", "abc", tuple(reversed(found.files)))
    assert digest(found) == digest(other)
    assert digest(found) != digest(Manifest(found.name, "", found.files[1:]))
    assert manifests.from_json(manifests.to_json(found)) == found


def test_big_files_are_read_once_until_they_change(tmp_path: Path) -> None:
    folder, cache = model_folder(tmp_path / "m", sizes=(2_000_000,)), tmp_path / "cache" / "digests.json"
    weights = folder / "model-00001-of-00001.safetensors"
    os.utime(weights, (1_000_000_000, 1_000_000_000))
    read: list[int] = []
    first = manifest_of(folder, "m", "", cache, lambda done, total: read.append(done))
    assert read[-1] > 2_000_000
    read.clear()
    assert manifest_of(folder, "m", "", cache, lambda done, total: read.append(done)) == first
    assert read[-1] < 1000
    weights.write_bytes(b"\1" * 2_000_000)
    assert manifest_of(folder, "m", "", cache) != first
    # So young that it could change without a sign: not remembered.
    assert str(weights) in cache.read_text()
    assert manifest_of(folder, "m", "", cache) == manifest_of(folder, "m", "", tmp_path / "other.json")


def test_big_files_of_the_hubs_cache_are_not_read(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "1"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    (blobs / ("ab" * 32)).write_bytes(b"weights")
    (snapshot / "model.safetensors").symlink_to(blobs / ("ab" * 32))
    (file,) = described(snapshot).files
    assert file == StoredFile("model.safetensors", "ab" * 32, 7)


@pytest.mark.parametrize(
    ("name", "sha256", "size"),
    [
        ("../x", "a" * 64, 1),
        ("a/b", "a" * 64, 1),
        ("..", "a" * 64, 1),
        ("", "a" * 64, 1),
        (".hidden", "a" * 64, 1),
        ("a\nb", "a" * 64, 1),
        ("x" * 300, "a" * 64, 1),
        ("x", "A" * 64, 1),
        ("x", "../" + "a" * 61, 1),
        ("x", "a" * 64, -1),
        ("x", "a" * 64, 1 << 60),
    ],
)
def test_files_that_cannot_be_meant_are_refused(name: str, sha256: str, size: int) -> None:
    with pytest.raises(UserError):
        check_files((StoredFile(name, sha256, size),))


def test_names_that_differ_in_case_only_are_refused() -> None:
    with pytest.raises(UserError, match="twice"):
        check_files((StoredFile("a", "a" * 64, 1), StoredFile("A", "b" * 64, 1)))


def test_a_model_that_has_arrived_can_be_loaded_from_a_folder(tmp_path: Path) -> None:
    folder, store = model_folder(tmp_path / "m"), Store(tmp_path / "store")
    manifest = described(folder)
    assert store.missing(manifest.files) == manifest.files
    key = fill(store, manifest, folder)
    assert store.missing(manifest.files) == ()
    found = store.folder_of(key)
    assert found is not None
    assert {path.name: path.read_bytes() for path in found.iterdir()} == {
        path.name: path.read_bytes() for path in folder.iterdir()
    }
    # Another process sees the same.
    assert Store(tmp_path / "store").folder_of(key) == found


def test_a_blob_that_was_changed_is_not_used_and_arrives_again(tmp_path: Path) -> None:
    folder, store = model_folder(tmp_path / "m", sizes=(5000,)), Store(tmp_path / "store")
    manifest = described(folder)
    key = fill(store, manifest, folder)
    weights = manifest.files[1]
    blob = store.blob(weights.sha256)
    blob.chmod(0o644)
    blob.write_bytes(b"x" * 5000)
    assert store.folder_of(key) is None
    assert store.missing(manifest.files) == (weights,)
    arriving = store.begin(weights)
    assert arriving is not None
    assert not arriving.resume()
    assert arriving.offset == 5000
    with pytest.raises(WrongDigest, match="damaged"):
        arriving.finish()
    put(store, weights, (folder / weights.name).read_bytes())
    assert store.folder_of(key) is not None


def test_a_blob_copied_by_hand_is_verified_and_then_used(tmp_path: Path) -> None:
    folder, store = model_folder(tmp_path / "m", sizes=(5000,)), Store(tmp_path / "store")
    weights = described(folder).files[1]
    store.blob(weights.sha256).parent.mkdir(parents=True)
    store.blob(weights.sha256).write_bytes((folder / weights.name).read_bytes())
    assert store.locate(weights.sha256) is None
    put(store, weights, b"")
    assert store.locate(weights.sha256, 5000) == store.blob(weights.sha256)


def test_an_interrupted_file_goes_on_where_it_ended(tmp_path: Path) -> None:
    folder, store = model_folder(tmp_path / "m"), Store(tmp_path / "store")
    file = described(folder).files[1]
    content = (folder / file.name).read_bytes()
    arriving = store.begin(file)
    assert arriving is not None
    arriving.write(content[:100_000])
    assert store.is_arriving(file.sha256)
    assert store.begin(file) is None
    assert Store(store.folder).begin(file) is None
    assert Store(store.folder).is_arriving(file.sha256)
    arriving.close()
    assert not store.is_arriving(file.sha256)
    assert store.partial_size(file.sha256) == 100_000
    again = Store(store.folder).begin(file)
    assert again is not None
    assert not again.resume()
    assert again.offset == 100_000
    again.write(content[100_000:])
    again.finish()
    assert store.begin(file) is None
    handle, size = store.open_for_reading(file.sha256)
    os.close(handle)
    assert size == file.size


def test_too_many_bytes_and_wrong_bytes_are_thrown_away(tmp_path: Path) -> None:
    store, file = Store(tmp_path / "store"), StoredFile("x", "a" * 64, 10)
    for content in (b"x" * 11, b"x" * 10):
        arriving = store.begin(file)
        assert arriving is not None
        with pytest.raises(WrongDigest, match="x arrived damaged"):  # noqa: PT012 - either may find it
            arriving.write(content)
            arriving.finish()
        assert store.partial_size(file.sha256) == 0
        assert not store.is_arriving(file.sha256)
    with pytest.raises(Absent):
        store.open_for_reading(file.sha256)


def test_a_writer_that_is_killed_leaves_its_file_to_the_next(tmp_path: Path) -> None:
    file = StoredFile("x", "a" * 64, 10)
    code = (
        "import sys, pathlib, os, signal; from node.store import Store; from node.info import StoredFile\n"
        "a = Store(pathlib.Path(sys.argv[1])).begin(StoredFile('x', 'a' * 64, 10)); a.write(b'12345')\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "store")], check=False)
    arriving = Store(tmp_path / "store").begin(file)
    assert arriving is not None
    arriving.resume()
    assert arriving.offset == 5
    arriving.close()


def test_files_are_used_where_they_are_until_they_change(tmp_path: Path) -> None:
    folder, store = model_folder(tmp_path / "m"), Store(tmp_path / "store")
    manifest = described(folder)
    key = store.adopt(manifest, folder)
    found = store.folder_of(key)
    assert found is not None
    assert (found / "config.json").resolve() == (folder / "config.json").resolve()
    assert store.size == 0
    (folder / "config.json").write_text("{}")
    assert store.folder_of(key) is None
    assert [file.name for file in store.missing(manifest.files)] == ["config.json"]
    with pytest.raises(TandemError, match="instead of"):
        store.adopt(manifest, folder)
    # The same model elsewhere takes its place.
    other = model_folder(tmp_path / "other")
    assert store.adopt(described(other), other) == key
    found = store.folder_of(key)
    assert found is not None
    assert (found / "config.json").resolve() == (other / "config.json").resolve()


def test_big_files_of_the_users_hub_cache_are_used_where_they_are(tmp_path: Path, no_hub_cache: Path) -> None:
    folder, store = model_folder(tmp_path / "m", sizes=(5000,)), Store(tmp_path / "store")
    manifest = described(folder)
    weights = manifest.files[1]
    blobs = no_hub_cache / "models--org--name" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / weights.sha256).write_bytes((folder / weights.name).read_bytes())
    assert weights not in store.missing(manifest.files)
    for file in store.missing(manifest.files):
        put(store, file, (folder / file.name).read_bytes())
    found = store.folder_of(store.save(manifest))
    assert found is not None
    assert (found / weights.name).resolve() == (blobs / weights.sha256).resolve()


def test_a_full_disk_is_said_and_loses_nothing(tmp_path: Path) -> None:
    store = Store(tmp_path / "store", free_bytes=lambda folder: 3 << 20)
    file = StoredFile("weights", "a" * 64, 4 << 20)
    arriving = store.begin(file)
    assert arriving is not None
    arriving.write(b"x" * 1000)
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, old[1]))
    try:
        with pytest.raises(NoRoom, match=r"no room .*store: 3 MB more needed, 3 MB free"):
            arriving.write(b"x" * (2 << 20))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        arriving.close()
    assert store.partial_size(file.sha256) == 1 << 20


def test_room_is_checked_before_and_made_by_removing_what_was_not_used_for_longest(tmp_path: Path) -> None:
    store = Store(tmp_path / "store", 10_100, free_bytes=lambda folder: 100 * GIGABYTE)
    keys = []
    for number in range(3):
        folder = model_folder(tmp_path / f"m{number}", sizes=(3000,), seed=10 * number)
        keys.append(fill(store, described(folder), folder))
        os.utime(store.folder / "manifests" / f"{keys[-1]}.json", (1000 + number, 1000 + number))
    new = described(model_folder(tmp_path / "new", sizes=(4000,), seed=99))
    hold = store.hold(keys[0])
    assert hold is not None
    assert [model.in_use for model in store.list()] == [False, False, True]
    store.make_room(new.files)
    assert [model.digest for model in store.list()] == [keys[2], keys[0]]
    assert store.folder_of(keys[0]) is not None
    assert store.folder_of(keys[1]) is None
    too_large = described(model_folder(tmp_path / "large", sizes=(8000,), seed=77))
    with pytest.raises(NoRoom, match="the store's limit"):
        store.make_room(too_large.files)
    hold.close()
    hold.close()
    store.make_room(too_large.files)
    # Files that several models share stay; here that is nothing but the two small ones.
    assert store.size < 3000
    full = Store(tmp_path / "store", free_bytes=lambda folder: GIGABYTE // 2)
    with pytest.raises(NoRoom, match="node store prune"):
        full.make_room((StoredFile("x", "a" * 64, GIGABYTE),))


def test_pruning_leaves_what_is_used_in_place_and_shared_files(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    own, in_place = (
        model_folder(tmp_path / "own", sizes=(3000,)),
        model_folder(tmp_path / "place", sizes=(3000,), seed=5),
    )
    filled, adopted = fill(store, described(own), own), store.adopt(described(in_place), in_place)
    stray = store.folder / "blobs" / ("f" * 64)
    stray.write_bytes(b"nobody's")
    pruned = store.prune(0)
    assert [model.digest for model in pruned.models] == [filled]
    assert pruned.freed == 3000 + 8
    # Both models have them, and the one in place found them here.
    assert pruned.left == store.size == len('{"model_type": "llama"}') + len("{}")
    assert not stray.exists()
    assert store.folder_of(adopted) is not None
    assert (in_place / "config.json").exists()
    assert store.hold(filled) is None


def test_the_default_limit_is_half_of_what_is_free_but_not_little(tmp_path: Path) -> None:
    assert Store(tmp_path / "s", free_bytes=lambda folder: 100 * GIGABYTE).limit_bytes == 50 * GIGABYTE
    assert Store(tmp_path / "s", free_bytes=lambda folder: 10 * GIGABYTE).limit_bytes == 20 * GIGABYTE


def test_errors_of_the_disk_are_put_in_words(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    assert isinstance(store.full(OSError(errno.ENOSPC, "No space left on device"), 5), NoRoom)
    assert not isinstance(store.full(OSError(errno.EIO, "Input/output error"), 5), NoRoom)


def test_the_store_command_lists_and_prunes(
    tmp_path: Path, tandem_home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from node.clikit import run_cli
    from node.commands.store import store as command

    folder, kept = model_folder(tmp_path / "m", sizes=(3000,)), Store(tandem_home / "store")
    key = fill(kept, described(folder, "org/name"), folder)
    assert run_cli(command, ["list"], "node store") == 0
    first, last = capsys.readouterr().out.splitlines()
    assert first.startswith(key[:12])
    assert first.endswith("org/name")
    assert str(tandem_home) in last
    assert run_cli(command, ["list", "--json"], "node store") == 0
    (model,) = json.loads(capsys.readouterr().out)["models"]
    assert model["complete"]
    assert model["digest"] == key
    hold = kept.hold(key)
    assert hold is not None
    assert run_cli(command, ["prune"], "node store") == 0
    assert "in use and kept: org/name" in capsys.readouterr().out
    hold.close()
    assert run_cli(command, ["prune", "--limit", "lots"], "node store") == 2
    capsys.readouterr()
    assert run_cli(command, ["prune", "--limit", "1GB"], "node store") == 0
    assert kept.folder_of(key) is not None
    capsys.readouterr()
    assert run_cli(command, ["prune", "--json"], "node store") == 0
    assert json.loads(capsys.readouterr().out)["models"][0]["digest"] == key
    assert kept.list() == ()
