"""Send a model folder to the Hugging Face Hub, with the user's own token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from node.errors import TandemError, UserError, one_line
from node.files import write_text_atomically


def upload(folder: Path, repo: str, base_model: str = "") -> str:
    """Create the repository where it is missing, and upload the folder in one commit.

    Args:
        folder: of the fused model.
        repo: ``owner/name`` on the Hub.
        base_model: the model it was made from, for attribution in the model card; "" keeps what the card says.

    Returns:
        The repository's address.

    Raises:
        UserError: the folder or the name is wrong, or the token is missing or lacks permission.
        TandemError: the Hub could not be reached or refused the upload.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    # OSError, and the error of whichever HTTP library this version of the client uses.
    no_connection: Any = HfHubHTTPError.__bases__

    try:
        validate_repo_id(repo)
    except HFValidationError:
        raise UserError(f"--upload-repo {repo!r}: not a name on the Hub; it should look like owner/name") from None
    if not (folder / "config.json").is_file():
        raise UserError(f"cannot upload {folder}: it holds no model (no config.json)")
    _attribute(folder, repo, base_model)
    try:
        api = HfApi()
        address = api.create_repo(repo_id=repo, exist_ok=True)
        api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            commit_message="Upload a model fine-tuned with mlx-tandem",
            ignore_patterns=[".*", "**/.*"],
        )
    except LocalTokenNotFoundError:
        raise UserError(f"cannot upload to {repo}: not logged in; run `hf auth login` or set HF_TOKEN") from None
    except HfHubHTTPError as error:
        raise _explained(repo, error) from error
    except no_connection as error:
        raise TandemError(f"cannot upload to {repo}: {one_line(error)}; the model is whole in {folder}") from error
    return str(address)


def _attribute(folder: Path, repo: str, base_model: str) -> None:
    """Bring the model card up to date: the base model, and how to load this one from where it will be."""
    from huggingface_hub import ModelCard

    path = folder / "README.md"
    card: Any = ModelCard(path.read_text(encoding="utf-8") if path.is_file() else "---\nlibrary_name: mlx\n---\n")
    if base_model:
        card.data.base_model = base_model
    known = card.data.base_model
    known = known[0] if isinstance(known, list) and known else known
    origin = f" from [{known}](https://huggingface.co/{known})" if known else ""
    card.text = (
        f"\n# {repo}\n\nFine-tuned{origin} with mlx-tandem.\n\n"
        f'```python\nfrom mlx_lm import generate, load\n\nmodel, tokenizer = load("{repo}")\n```\n'
    )
    write_text_atomically(path, str(card))


def _explained(repo: str, error: Any) -> TandemError:
    status = error.response.status_code if error.response is not None else 0
    if status == 401:
        return UserError(f"cannot upload to {repo}: the Hub does not accept your token; run `hf auth login`")
    if status == 403:
        return UserError(f"cannot upload to {repo}: your token may not write there; use one with write permission")
    if status == 404:
        return UserError(f"cannot upload to {repo}: no such owner on the Hub, or your token cannot see it")
    return TandemError(f"cannot upload to {repo}: the Hub answered {one_line(error)}")
