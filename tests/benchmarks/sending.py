"""A coordinator that does nothing but distribute a model: MODEL HOME SOURCE NODE…, each node as ``host:port``."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from pathlib import Path

from coordinator.distribution import distribute
from node.client import NodeClient
from node.manifest import manifest_of
from node.store import Store
from node.trust import Trust, certificate_at


async def main(model: Path, home: Path, *addresses: str) -> None:
    manifest = manifest_of(model, "benchmark", "", home / "cache" / "digests.json")
    Store(home / "store").adopt(manifest, model)
    os.environ["TANDEM_HOME"] = str(home)
    certificates = [await certificate_at(address, 10.0) for address in addresses]
    clients = [
        NodeClient(address, certificate=certificate)
        for address, certificate in zip(addresses, certificates, strict=True)
    ]
    infos = [await client.describe() for client in clients]
    receivers = {info.id: (client, info) for client, info in list(zip(clients, infos, strict=True))[1:]}
    begun = time.perf_counter()
    troubles = await distribute(
        manifest,
        receivers,
        (addresses[0], infos[0]),
        Trust(home).certificate_of,
        progress=lambda *_: None,
        note=lambda _: None,
    )
    seconds = time.perf_counter() - begun
    for client in clients:
        await client.close()
    if troubles:
        raise SystemExit(str(troubles))
    print(json.dumps({"seconds": seconds}))


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:]))
