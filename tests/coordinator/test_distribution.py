from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from coordinator.distribution import addresses_of, chain, distribute
from node.errors import NodeError, NodeLost
from node.hardware import Facts
from node.home import home
from node.identity import credentials
from node.info import Interface, InterfaceKind, Manifest, NodeInfo, StoredFile
from node.manifest import digest
from node.store import Store
from tests.fixtures.stores import CountingService, described, model_folder, serving_files

FACTS = Facts(
    name=None, chip=None, total_memory_bytes=None, free_memory_bytes=None, gpu_memory_bytes=None, cores=None, os=None,
    python="3", mlx=None, mlx_lm=None,
)  # fmt: skip


def info(name: str, *addresses: str) -> NodeInfo:
    kinds: dict[str, InterfaceKind] = {"169": "thunderbolt", "127": "loopback", "192": "ethernet"}
    interfaces = tuple(Interface("en0", kinds.get(address[:3], "other"), address) for address in addresses)
    return NodeInfo(name, name, name, 1, "0", FACTS, interfaces)


@pytest.mark.parametrize(
    ("holders", "lacking", "speeds", "expected"),
    [
        (["a"], [], {}, {}),
        (["a"], ["b"], {}, {"b": ("a",)}),
        (["a"], ["b", "c", "d"], {}, {"b": ("a",), "c": ("b", "a"), "d": ("c", "b", "a")}),
        # The fastest first: what comes after a slow one is slow.
        (["a"], ["b", "c"], {("a", "b"): 1.0, ("a", "c"): 9.0}, {"c": ("a",), "b": ("c", "a")}),
        # Two sources, two chains; each stands in for the other.
        (
            ["a", "b"],
            ["c", "d", "e", "f"],
            {},
            {"c": ("a", "b"), "d": ("b", "a"), "e": ("c", "a", "b"), "f": ("d", "b", "a")},
        ),
        # A source behind a slow link is left alone while there is a faster one.
        (
            ["slow", "fast"],
            ["c", "d"],
            {("slow", "c"): 1.0, ("slow", "d"): 1.0, ("fast", "c"): 9.0, ("fast", "d"): 9.0, ("c", "d"): 9.0},
            {"c": ("fast", "slow"), "d": ("c", "fast", "slow")},
        ),
        (["a", "b"], ["b", "c"], {}, {"c": ("a", "b")}),
        ([], ["b"], {}, {}),
    ],
)
def test_who_gets_it_from_whom(
    holders: list[str], lacking: list[str], speeds: dict[tuple[str, str], float], expected: dict[str, tuple[str, ...]]
) -> None:
    order = chain(holders, lacking, speeds)
    assert order == expected
    assert list(order) == list(expected)
    # Nobody is the first choice of two.
    firsts = [sources[0] for sources in order.values()]
    assert len(set(firsts)) == len(firsts)


@pytest.mark.parametrize(
    ("source", "receiver", "expected"),
    [
        # On this machine the coordinator's own node is known by loopback only; others get its real address.
        (("127.0.0.1:7", info("a", "192.168.1.2")), ("192.168.1.3:9", info("b", "192.168.1.3")), ("192.168.1.2:7",)),
        # A cable between the two comes before the network.
        (
            ("192.168.1.2:7", info("a", "169.254.1.1", "192.168.1.2")),
            ("192.168.1.3:9", info("b", "169.254.1.2", "192.168.1.3")),
            ("169.254.1.1:7", "192.168.1.2:7"),
        ),
        # A cable to somebody else means nothing.
        (("192.168.1.2:7", info("a", "169.254.1.1")), ("192.168.1.3:9", info("b", "192.168.1.3")), ("192.168.1.2:7",)),
        # Where the coordinator reaches it comes before what it could be reached by besides.
        (("10.0.0.5:7", info("a", "192.168.1.2")), ("x:9", info("b", "172.16.0.3")), ("10.0.0.5:7", "192.168.1.2:7")),
        (("127.0.0.1:7", info("a", "127.0.0.1")), ("127.0.0.1:9", info("b", "127.0.0.1")), ("127.0.0.1:7",)),
        (
            ("192.168.1.2:7", info("a", "192.168.1.2")),
            ("192.168.1.2:9", info("b", "192.168.1.2")),
            ("127.0.0.1:7", "192.168.1.2:7"),
        ),
    ],
)
def test_where_one_reaches_another(
    source: tuple[str, NodeInfo], receiver: tuple[str, NodeInfo], expected: tuple[str, ...]
) -> None:
    assert addresses_of(source, receiver) == expected


def test_three_nodes_get_a_model_that_crosses_each_link_once(tmp_path: Path) -> None:
    async def main() -> None:
        folder = model_folder(tmp_path / "m", sizes=(3_000_000,))
        manifest, stores = described(folder), [Store(tmp_path / str(i)) for i in range(4)]
        stores[0].adopt(manifest, folder)
        # One has the weights already.
        arriving = stores[2].begin(manifest.files[1])
        assert arriving is not None
        arriving.write((folder / manifest.files[1].name).read_bytes())
        arriving.finish()
        moved: list[tuple[int, int]] = []
        said: list[str] = []
        async with AsyncExitStack() as stack:
            services = [CountingService(store) for store in stores]
            clients = [await stack.enter_async_context(serving_files(service)) for service in services]
            nodes = {f"n{i}": (clients[i], info(f"n{i}", "127.0.0.1")) for i in range(4)}

            async def again() -> dict[str, str]:
                return await distribute(
                    manifest,
                    nodes,
                    (clients[0].address, nodes["n0"][1]),
                    ours,
                    progress=lambda done, total: moved.append((done, total)),
                    note=said.append,
                )

            assert await again() == {}
            small = manifest.size - 3_000_000
            wanted = 2 * manifest.size + small
            assert moved[-1] == (wanted, wanted)
            assert moved == sorted(moved)
            assert said == ["sending some/model (3 MB) to n1, n2, n3"]
            assert sum(service.sent for service in services) == wanted
            assert services[0].sent == manifest.size
            assert all(store.folder_of(digest(manifest)) is not None for store in stores)
            # Now all have it.
            assert await again() == {}
            assert len(said) == 1
            assert sum(service.sent for service in services) == wanted

    asyncio.run(main())


def test_a_node_that_has_all_files_learns_which_model_they_make_up(tmp_path: Path) -> None:
    async def main() -> None:
        folder = model_folder(tmp_path / "m", sizes=(1000,))
        manifest, store = described(folder), Store(tmp_path / "s")
        for file in manifest.files:
            store.adopt_file(file, folder / file.name)
        assert store.folder_of(digest(manifest)) is None
        async with serving_files(CountingService(store)) as client:
            nodes = {"n": (client, info("n", "127.0.0.1"))}
            source = (client.address, info("s", "127.0.0.1"))
            assert await distribute(manifest, nodes, source, ours, progress=lambda *_: None, note=print) == {}
        assert store.folder_of(digest(manifest)) is not None

    asyncio.run(main())


def ours(home_id: str) -> bytes:
    """All these nodes are of one home."""
    return credentials(home()).certificate


class Fails:
    """A node that cannot be asked, or cannot get it."""

    address = "127.0.0.1:1"

    def __init__(self, when: str) -> None:
        self._when = when

    async def missing(self, files: Sequence[StoredFile]) -> tuple[StoredFile, ...]:
        if self._when == "asked":
            raise NodeLost("it cannot be reached")
        return tuple(files)

    async def pull(
        self,
        manifest: Manifest,
        sources: Sequence[str],
        progress: Callable[[int, int], None],
        certificates: Mapping[str, bytes],
    ) -> str:
        raise NodeError("no room")


def test_nodes_that_fail_are_reported_and_the_others_go_on(tmp_path: Path) -> None:
    async def main() -> None:
        folder = model_folder(tmp_path / "m", sizes=(100_000,))
        manifest, store = described(folder), Store(tmp_path / "s")
        store.adopt(manifest, folder)
        async with AsyncExitStack() as stack:
            source = await stack.enter_async_context(serving_files(CountingService(store)))
            client = await stack.enter_async_context(serving_files(CountingService(Store(tmp_path / "t"))))
            nodes = {
                "lost": (Fails("asked"), info("lost")),
                "full": (Fails("told"), info("full")),
                "well": (client, info("well")),
            }
            troubles = await distribute(
                manifest, nodes, (source.address, info("s")), ours, progress=lambda *_: None, note=lambda _: None
            )
        assert troubles == {"lost": "it cannot be reached", "full": "no room"}
        assert Store(tmp_path / "t").folder_of(digest(manifest)) is not None

    asyncio.run(main())
