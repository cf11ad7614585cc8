"""What workers and their reducers find in their environment: what they need, and none of the user's secrets."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from node.client import NodeClient
from node.environment import UNLESS_SET, handed_down
from node.events import Joined, Ready
from node.logs import KEPT_LOG_BYTES, MOST_LOG_BYTES
from node.spec import JobSpec, ModelSpec, Setup
from node.supervisor import LOG_NAME, LocalWorker
from tests.fixtures.models import tiny_model
from tests.fixtures.nodes import ServingNode
from tests.fixtures.processes import descendants
from tests.fixtures.ranks import ranks, ring_specs

SECRETS = {
    "HF_TOKEN": "hf_SECRET",
    "HUGGING_FACE_HUB_TOKEN": "hf_SECRET",
    "WANDB_API_KEY": "wandb_SECRET",
    "AWS_ACCESS_KEY_ID": "aws_SECRET",
    "AWS_SECRET_ACCESS_KEY": "aws_SECRET",
    "SSH_AUTH_SOCK": "/tmp/ssh-SECRET/agent",
    "GITHUB_TOKEN": "gh_SECRET",
    "OPENAI_API_KEY": "sk_SECRET",
    "DATABASE_URL": "postgres://SECRET",
    "MLX_TOKEN": "mlx_SECRET",
    "TANDEM_PAIRING_CODE": "tandem_SECRET",
    "SOMETHING_NOBODY_HAS_HEARD_OF": "other_SECRET",
}


def environment_of(pid: int) -> dict[str, str]:
    entries = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
    return dict(entry.split("=", 1) for entry in entries if entry)


def assert_clean(environment: dict[str, str]) -> None:
    assert not set(SECRETS) & set(environment)
    assert "SECRET" not in "".join(environment.values())
    assert environment["HF_HUB_OFFLINE"] == "1"
    assert environment["HF_HUB_DISABLE_IMPLICIT_TOKEN"] == "1"
    assert environment["PATH"]


needs_proc = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="reads /proc, which is Linux's")


def test_only_what_is_listed_is_handed_down() -> None:
    wanted = {"PATH": "/bin", "HOME": "/h", "LC_ALL": "C", "MLX_METAL_JIT": "1", "OMP_NUM_THREADS": "2"}
    found = handed_down({**wanted, **SECRETS})
    assert wanted.items() <= found.items()
    assert not set(SECRETS) & set(found)


def test_the_heap_is_set_up_unless_somebody_did() -> None:
    name = "MALLOC_TRIM_THRESHOLD_"
    assert handed_down({})[name] == UNLESS_SET[name]
    assert handed_down({name: "4096"})[name] == "4096"


@needs_proc
def test_workers_and_reducers_alone_get_no_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    model = tiny_model(tmp_path / "model", "llama")

    async def work() -> None:
        async with asyncio.timeout(100), ranks(2, tmp_path, model) as group:
            assert all(isinstance(event, Joined) for event in await group.join(ring_specs(2)))
            for worker in group.workers:
                (reducer,) = descendants(worker.pid)
                assert "SECRET" not in "".join(environment_of(reducer).values())
                assert_clean(environment_of(worker.pid))

    asyncio.run(work())


@needs_proc
def test_a_nodes_worker_gets_no_secrets(tmp_path: Path) -> None:
    async def work(node: ServingNode) -> None:
        client = NodeClient(node.address, node.name, node.certificate)
        try:
            link = await client.open_worker("run", "somebody")
            pids = node.worker_pids()
            assert pids
            for pid in pids:
                assert_clean(environment_of(pid))
            await link.close()
        finally:
            await client.close()

    with ServingNode("Studio", tmp_path / "home", environment=SECRETS) as node:
        assert environment_of(node.process.pid)["HF_TOKEN"] == SECRETS["HF_TOKEN"]  # the check can fail
        asyncio.run(work(node))


def test_a_log_that_grows_without_end_is_cut(tmp_path: Path) -> None:
    log = tmp_path / "job" / LOG_NAME
    model = tiny_model(tmp_path / "model", "llama")

    async def work() -> None:
        worker = await LocalWorker.start(log.parent)
        try:
            with log.open("ab") as file:
                file.write(b"again and again\n" * (MOST_LOG_BYTES // 16 + 1))
            await worker.send(Setup(JobSpec("job", str(log.parent), ModelSpec(str(model)))))
            while not isinstance(await worker.receive(), Ready):
                pass
        finally:
            await worker.close()

    asyncio.run(work())
    assert log.stat().st_size < 2 * KEPT_LOG_BYTES
    first = log.read_bytes().splitlines()[0].decode()
    assert first.endswith(f"bytes of log were dropped here: {MOST_LOG_BYTES} are the most)")
