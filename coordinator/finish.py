"""After the last step: fuse and export as asked, and say where everything is."""

from __future__ import annotations

import dataclasses
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from coordinator.checkpoint import Progress
from coordinator.config import TrainConfig
from coordinator.crew import FROZEN_SECONDS
from coordinator.models import ResolvedModel
from coordinator.runfolder import RunFolder
from coordinator.stream import Advanced, Noted, Reader, perplexity
from coordinator.workers import ask, task_worker
from node.errors import TandemError, UserError
from node.events import Fused
from node.files import sha256_of
from node.spec import FileRef, Fuse, ModelSpec

if TYPE_CHECKING:
    from node.client import RemoteWorker

WEIGHTS = "adapters.safetensors"
SETTINGS = "adapter_config.json"


def wants_fuse(config: TrainConfig) -> bool:
    """Whether the options ask for anything beyond the adapter."""
    return bool(config.fuse or config.export_gguf or config.export_peft or config.upload_repo)


@dataclass(frozen=True)
class FusingNode:
    """The machine that is to fuse.

    Attributes:
        name, address: of its node.
        certificate: of its ``TANDEM_HOME``, in PEM.
        manifest: SHA-256 of the model's manifest, which the node's store holds.
        owner: who asks, for people.
    """

    name: str
    address: str
    certificate: bytes | None
    manifest: str
    owner: str


async def fuse_result(
    config: TrainConfig, model: ResolvedModel, folder: RunFolder, reader: Reader, node: FusingNode | None
) -> tuple[str, ...]:
    """Write the fused model, GGUF file and PEFT adapter that the options ask for.

    Args:
        config: the options.
        model: that was trained.
        folder: of the run.
        reader: takes progress.
        node: who does it; None this machine. When it cannot, this machine does.

    Returns:
        The paths that were written.
    """
    if not wants_fuse(config):
        return ()
    request = Fuse(
        model=ModelSpec(str(model.path), str(folder.path), config.trust_remote_code),
        save_path=config.save_path,
        dequantize=config.dequantize,
        gguf_path=_gguf_name(config) if config.export_gguf else "",
        gguf_type=config.gguf_type,
        source=config.hf_path or model.name,
        fused_model=bool(config.fuse or config.upload_repo),
        peft_path=config.export_peft or "",
    )
    if node is not None:
        try:
            written = await _fuse_there(node, request, folder, reader)
        except UserError:
            raise
        except TandemError as error:
            reader.handle(Noted("fuse_failed", f"{node.name} could not fuse ({error}); fusing here", "warning"))
        else:
            return _uploaded(request, written, config.upload_repo, reader)
    return await fuse(request, config.upload_repo, reader)


async def _fuse_there(node: FusingNode, request: Fuse, folder: RunFolder, reader: Reader) -> tuple[str, ...]:
    """Have another machine fuse, and fetch what it wrote, each file verified.

    Raises:
        NodeError, WorkerError: it could not.
    """
    from node.client import NodeClient

    client = NodeClient(node.address, node.name, node.certificate)
    try:
        link = await client.open_worker(f"fuse-{folder.path.name}", node.owner)
        done = False
        try:
            for name in (WEIGHTS, SETTINGS):
                path = folder.path / name
                await link.give(FileRef(name, sha256_of(path), path.stat().st_size), path)
            gguf = Path(request.gguf_path).name if request.gguf_path else ""
            there = dataclasses.replace(
                request,
                model=ModelSpec("", ".", request.model.trust_remote_code, node.manifest),
                save_path="fused",
                gguf_path=gguf,
                peft_path="peft" if request.peft_path else "",
            )
            # This machine can do it as well: no longer patience than with one of several that train.
            fused = await ask(link, there, Fused, reader, silence_seconds=FROZEN_SECONDS)
            written = []
            for kind, target in (("fused", request.save_path), ("peft", request.peft_path)):
                written += await _fetch_folder(link, kind, Path(target), request.gguf_path, reader) if target else []
            done = True
        finally:
            if not done:
                link.kill()  # it may be frozen: then it would not hear that it is let go
            await link.close()
    finally:
        await client.close()
    reader.handle(
        Noted("fused", f"{node.name} wrote {', '.join(written)}", details={"seconds": fused.seconds, "node": node.name})
    )
    return tuple(written)


async def _fetch_folder(link: RemoteWorker, kind: str, target: Path, gguf_path: str, reader: Reader) -> list[str]:
    """Fetch what a node wrote into one of its folders; a GGUF file goes where it was asked for."""
    files = await link.outputs(kind)
    total, done = sum(file.size for file in files), 0
    gguf = target / gguf_path
    written: list[str] = []
    for file in files:
        reader.handle(Advanced("fetching the result", done, total, in_bytes=True))
        beside = gguf_path and file.name in (gguf.name, "Modelfile")
        path = gguf.with_name(file.name) if beside else target / file.name
        FileRef(file.name, file.sha256, file.size)  # bare, or refused
        path.parent.mkdir(parents=True, exist_ok=True)
        await link.fetch_output(file, path)
        done += file.size
        if beside:
            written.append(str(path))
    others = [file for file in files if not gguf_path or file.name not in (gguf.name, "Modelfile")]
    return ([str(target)] if others else []) + written


def _gguf_name(config: TrainConfig) -> str:
    """The name that was given; the default one says what is in the file."""
    unsaid = config.gguf_path == TrainConfig.gguf_path
    return f"ggml-model-{config.gguf_type}.gguf" if unsaid else config.gguf_path


async def fuse(request: Fuse, upload_repo: str | None, reader: Reader) -> tuple[str, ...]:
    """Have a worker write what the request names, then upload it if asked.

    Returns:
        The paths, or the address, of what was written.
    """
    async with task_worker(None) as worker:
        fused = await ask(worker, request, Fused, reader)
    reader.handle(Noted("fused", f"wrote {', '.join(fused.files)}", details={"seconds": fused.seconds}))
    return _uploaded(request, fused.files, upload_repo, reader)


def _uploaded(request: Fuse, written: tuple[str, ...], upload_repo: str | None, reader: Reader) -> tuple[str, ...]:
    """Upload the fused model if asked; what was written, and where it was uploaded to."""
    if not upload_repo:
        return written
    from coordinator.upload import upload

    address = upload(Path(request.save_path), upload_repo, request.source)
    reader.handle(Noted("uploaded", f"uploaded {request.save_path} to {upload_repo}"))
    return (*written, address)


def summary(
    folder: RunFolder,
    progress: Progress,
    test_loss: float | None,
    replayed_steps: int,
    written: tuple[str, ...],
    fleet: tuple[tuple[str, str], ...] = (),
) -> tuple[tuple[str, str], ...]:
    """Labelled lines of the receipt; ``fleet`` is what several machines add to it."""
    lines = [("adapter", f"{folder.path / 'adapters.safetensors'} (step {progress.step})")]
    if progress.best_loss is not None and progress.best_step is not None:
        lines.append(("validation", f"best loss {progress.best_loss:.4f} at step {progress.best_step}"))
    if test_loss is not None:
        lines.append(("test", f"loss {test_loss:.4f}, perplexity {perplexity(test_loss):.3f}"))
    lines.append(("time", f"{_duration(progress.seconds)} of training"))
    lines += fleet
    if replayed_steps:
        lines.append(("faults", f"{replayed_steps} steps were computed again"))
    lines += [("wrote", path) for path in written]
    lines.append(("report", str(folder.report)))
    return tuple(lines)


def next_commands(
    config: TrainConfig, model: str, status: str, written: tuple[str, ...]
) -> tuple[tuple[str, str], ...]:
    """What to type next: (purpose, command)."""
    adapter = shlex.quote(config.adapter_path)
    if status in ("interrupted", "failed"):
        return (("go on", f"coordinator train --resume --adapter-path {adapter}"),)
    base = f"--model {shlex.quote(model)} --adapter-path {adapter}"
    commands = [("try it", f"coordinator generate {base} --prompt 'Hello'")]
    if not written:
        commands.append(("merge it", f"coordinator fuse {base}"))
    return tuple(commands)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
