"""``coordinator fuse``: an adapter merged into its model, and the forms other programs read."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from coordinator.adapters import model_of, read_adapter
from coordinator.background import in_background
from coordinator.config import GGUF_TYPES
from coordinator.finish import fuse as write
from coordinator.models import resolve
from coordinator.stream import Noted, Reader, RunEvent
from node.errors import UserError
from node.spec import Fuse, ModelSpec


@dataclass(frozen=True)
class FuseOptions:
    """What to write, from which adapter.

    Attributes:
        model: a Hugging Face repo or a folder; "" is the one that the adapter was trained on.
        adapter_path: folder of the adapter.
        save_path: folder for the fused model.
        dequantize: write full-precision weights from a quantized base.
        fused_model: False when only a GGUF file or a PEFT adapter is wanted.
        export_gguf: write a GGUF file too.
        gguf_path: its name, in ``save_path`` where it is relative; "" is ``ggml-model-TYPE.gguf``.
        gguf_type: of its weights.
        export_peft: folder for the adapter in PEFT's layout, or "".
        upload_repo: Hugging Face repository to upload the fused model to, or "".
        hf_path: base model to name in the model card; "" is ``model``.
        trust_remote_code: whether the model's own Python files may run.
    """

    model: str = ""
    adapter_path: str = "adapters"
    save_path: str = "fused_model"
    dequantize: bool = False
    fused_model: bool = True
    export_gguf: bool = False
    gguf_path: str = ""
    gguf_type: str = "f16"
    export_peft: str = ""
    upload_repo: str = ""
    hf_path: str = ""
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if self.gguf_type not in GGUF_TYPES:
            raise UserError(f"--gguf-type: {self.gguf_type!r} is none of {', '.join(GGUF_TYPES)}")
        if not self.save_path:
            raise UserError("--save-path: say where the fused model goes")
        if not (self.fused_model or self.export_gguf or self.export_peft):
            raise UserError("--no-fused-model leaves nothing to write; add --export-gguf or --export-peft FOLDER")
        if self.upload_repo and not self.fused_model:
            raise UserError("--upload-repo and --no-fused-model exclude each other: it is the fused model that goes up")


@dataclass(frozen=True)
class FuseResult:
    """What was written.

    Attributes:
        written: files and folders, and the address of an upload last.
        next_commands: what to type next, with a purpose each: (purpose, command).
    """

    written: tuple[str, ...]
    next_commands: tuple[tuple[str, str], ...]


async def fuse(options: FuseOptions, view: Reader) -> FuseResult:
    """Merge an adapter into its model and write what was asked for, each output whole or not at all.

    Args:
        options: what to write.
        view: is told of progress and warnings.

    Raises:
        UserError: a mistake in what was asked for; nothing was written.
        TandemError: the worker or the upload failed.
    """
    adapter = read_adapter(options.adapter_path)
    name = model_of(options.model, adapter)
    if options.upload_repo:
        _check_repo(options.upload_repo)
    if (options.gguf_path or options.gguf_type != "f16") and not options.export_gguf:
        view.handle(Noted("no_gguf", "no GGUF file is written: that takes --export-gguf", "warning"))
    model = await in_background(
        lambda advance: resolve(name, progress=advance, trust_remote_code=options.trust_remote_code), view
    )
    gguf = _file(options.gguf_path) or f"ggml-model-{options.gguf_type}.gguf"
    request = Fuse(
        model=ModelSpec(str(model.path), str(adapter.path), options.trust_remote_code),
        save_path=_file(options.save_path),
        dequantize=options.dequantize,
        gguf_path=gguf if options.export_gguf else "",
        gguf_type=options.gguf_type,
        source=options.hf_path or model.name,
        fused_model=options.fused_model,
        peft_path=_file(options.export_peft),
    )
    written = await write(request, options.upload_repo or None, _Underway(view))
    return FuseResult(written, _next_commands(request))


class _Underway:
    """Passes on what happens on the way; the outcome is the caller's to tell."""

    def __init__(self, view: Reader) -> None:
        self._view = view

    def handle(self, event: RunEvent) -> None:
        """See ``stream.Reader``."""
        if not isinstance(event, Noted):
            self._view.handle(event)

    def close(self) -> None:
        """See ``stream.Reader``."""


def _file(path: str) -> str:
    return str(Path(path).expanduser()) if path else ""


def _check_repo(repo: str) -> None:
    """Find a name that the Hub refuses before an hour of work, not after it."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repo)
    except HFValidationError:
        raise UserError(f"--upload-repo {repo!r}: not a name on the Hub; it should look like owner/name") from None


def _next_commands(request: Fuse) -> tuple[tuple[str, str], ...]:
    commands = []
    if request.fused_model:
        commands.append(("try it", f"coordinator generate --model {shlex.quote(request.save_path)} --prompt 'Hello'"))
    if request.gguf_path:
        gguf = Path(request.save_path) / request.gguf_path
        commands.append(("in llama.cpp", f"llama-cli -m {shlex.quote(str(gguf))}"))
        commands.append(("in Ollama", f"ollama create NAME -f {shlex.quote(str(gguf.with_name('Modelfile')))}"))
    return tuple(commands)
