"""After the last step: fuse and export as asked, and say where everything is."""

from __future__ import annotations

import shlex
from pathlib import Path

from coordinator.checkpoint import Progress
from coordinator.config import TrainConfig
from coordinator.runfolder import RunFolder
from coordinator.stream import Noted, Reader, perplexity
from coordinator.workers import ask, task_worker
from node.events import Fused
from node.spec import Fuse, ModelSpec


def wants_fuse(config: TrainConfig) -> bool:
    """Whether the options ask for anything beyond the adapter."""
    return bool(config.fuse or config.export_gguf or config.export_peft or config.upload_repo)


async def fuse_result(
    config: TrainConfig, model: Path, name: str, folder: RunFolder, reader: Reader
) -> tuple[str, ...]:
    """Write the fused model, GGUF file and PEFT adapter that the options ask for.

    Returns:
        The paths that were written.
    """
    if not wants_fuse(config):
        return ()
    request = Fuse(
        model=ModelSpec(str(model), str(folder.path), config.trust_remote_code),
        save_path=config.save_path,
        dequantize=config.dequantize,
        gguf_path=_gguf_name(config) if config.export_gguf else "",
        gguf_type=config.gguf_type,
        source=config.hf_path or name,
        fused_model=bool(config.fuse or config.upload_repo),
        peft_path=config.export_peft or "",
    )
    return await fuse(request, config.upload_repo, reader)


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
    written = fused.files
    reader.handle(Noted("fused", f"wrote {', '.join(written)}", details={"seconds": fused.seconds}))
    if upload_repo:
        from coordinator.upload import upload

        written = (*written, upload(Path(request.save_path), upload_repo, request.source))
        reader.handle(Noted("uploaded", f"uploaded {request.save_path} to {upload_repo}"))
    return written


def summary(
    folder: RunFolder,
    progress: Progress,
    test_loss: float | None,
    replayed_steps: int,
    written: tuple[str, ...],
) -> tuple[tuple[str, str], ...]:
    """Labelled lines of the receipt."""
    lines = [("adapter", f"{folder.path / 'adapters.safetensors'} (step {progress.step})")]
    if progress.best_loss is not None and progress.best_step is not None:
        lines.append(("validation", f"best loss {progress.best_loss:.4f} at step {progress.best_step}"))
    if test_loss is not None:
        lines.append(("test", f"loss {test_loss:.4f}, perplexity {perplexity(test_loss):.3f}"))
    lines.append(("time", f"{_duration(progress.seconds)} of training"))
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
