"""What a worker imports, and what it does not; in processes of their own, for this one has imported all."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.fixtures.models import tiny_model


def run(program: str, *arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_a_worker_does_without_the_tokenizers_library() -> None:
    run(
        "import sys\n"
        "from node.worker.imports import import_mlx_lm\n"
        "import_mlx_lm()\n"
        "import node.worker.loop, node.worker.generate, node.worker.export\n"
        "assert 'mlx_lm' in sys.modules\n"
        "assert not [name for name in sys.modules if name.startswith('transformers')]\n"
    )


def test_tokenizers_come_where_they_are_needed(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model", "llama")
    run(
        "import sys\n"
        "from pathlib import Path\n"
        "from node.worker.imports import import_mlx_lm, with_tokenizers\n"
        "import_mlx_lm()\n"
        "from mlx_lm.utils import load_tokenizer\n"
        "for _ in range(2):\n"
        "    with_tokenizers()\n"
        "    tokenizer = load_tokenizer(Path(sys.argv[1]))\n"
        "    assert tokenizer.decode(tokenizer.encode('quick')).endswith('quick')\n",
        str(model),
    )


def test_an_mlx_lm_that_does_more_with_it_gets_it() -> None:
    run(
        "import sys\n"
        "from node.worker import imports\n"
        "def nothing(self, name):\n"
        "    raise AttributeError(name)\n"
        "imports._StandIn.__getattr__ = nothing\n"
        "imports.import_mlx_lm()\n"
        "import node.worker.loop\n"
        "import transformers\n"
        "assert transformers.__version__\n"
    )
