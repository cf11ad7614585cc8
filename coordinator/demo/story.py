"""The demo's story: a model is made, learns sentences, is taught to answer by two nodes, is asked before and after."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from coordinator.api import fuse, generate, test, train
from coordinator.config import TrainConfig
from coordinator.demo.data import Fact, Split, conversations, documents, split_facts, write_rows
from coordinator.demo.follow import Follower, Say
from coordinator.demo.model import Shape, write_model
from coordinator.demo.nodes import serving, surroundings
from coordinator.demo.tokenizer import write_tokenizer
from coordinator.evaluation import TestOptions, TestResult
from coordinator.fusing import FuseOptions
from coordinator.generation import GenerateOptions


@dataclass(frozen=True)
class Plan:
    """Sizes of the demo, chosen for two slow cores.

    Attributes:
        texts: plain texts to learn from.
        vocabulary: tokens of the tokenizer, at most.
        hidden, layers: of the model.
        sentence_steps, sentence_rate: of the full fine-tuning, 32 texts a step; the rate falls to 0 as a cosine.
        lora_steps, lora_rate: of the LoRA training, 16 questions a step.
        shown: questions whose answers are printed.
        seed: of everything random.
    """

    texts: int = 900
    vocabulary: int = 640
    hidden: int = 128
    layers: int = 3
    sentence_steps: int = 100
    sentence_rate: float = 1.5e-3
    lora_steps: int = 80
    lora_rate: float = 5e-4
    shown: int = 6
    seed: int = 0


@dataclass
class DemoResult:
    """What happened, with names as ``--json`` prints them.

    Attributes:
        parameters: of the model.
        sentence_losses, lora_losses: training loss of every step.
        validation_losses: before, during and after the LoRA training.
        test_before, test_after: loss and perplexity of the held-out questions.
        answers: question, expected answer, and the answers before and after.
        right_before, right_after: exact answers, of ``asked`` held-out questions.
        files: what was written: base model, adapter, fused model, GGUF file, report.
    """

    parameters: int = 0
    sentence_losses: list[float] = field(default_factory=list)
    lora_losses: list[float] = field(default_factory=list)
    validation_losses: list[float] = field(default_factory=list)
    test_before: dict[str, float] = field(default_factory=dict)
    test_after: dict[str, float] = field(default_factory=dict)
    answers: list[dict[str, str]] = field(default_factory=list)
    right_before: int = 0
    right_after: int = 0
    asked: int = 0
    files: dict[str, str] = field(default_factory=dict)


def tell(folder: Path, say: Say, plan: Plan | None = None) -> DemoResult:
    """Run the whole story in a folder.

    Args:
        folder: an existing, empty folder; everything is written below it.
        say: takes each line to show.
        plan: the sizes.

    Raises:
        TandemError: a stage failed.
    """
    story = _Story(folder, say, plan or Plan())
    stages: Sequence[tuple[str, Callable[[], None]]] = (
        ("Make a model and data", story.make),
        ("Teach it plain sentences: full fine-tuning", story.learn_sentences),
        ("Ask before", story.ask_before),
        ("Teach it to answer: two nodes, found by Bonjour, train one LoRA adapter", story.learn_to_answer),
        ("Fuse the adapter, export GGUF", story.fuse),
        ("Ask after", story.ask_after),
    )
    with _own_surroundings():
        for number, (heading, stage) in enumerate(stages, 1):
            say(f"{number}/{len(stages)} {heading}")
            stage()
    return story.result


class _Story:
    """The stages, in their order, and what the later ones need of the earlier."""

    def __init__(self, folder: Path, say: Say, plan: Plan) -> None:
        self.folder = folder
        self.plan = plan
        self.result = DemoResult()
        self._say = say
        self._split: Split = split_facts(plan.seed)
        self._questions = [(fact.question(form), fact.sentence) for fact in self._split.test for form in (0, 1)]
        self._before: list[str] = []

    def make(self) -> None:
        """Write the texts, the questions, the tokenizer and the random model."""
        plan, split = self.plan, self._split
        texts = documents(plan.seed, plan.texts)
        write_rows(self.folder / "sentences" / "train.jsonl", [{"text": text} for text in texts])
        parts: dict[str, tuple[Fact, ...]] = {"train": split.train, "valid": split.valid, "test": split.test}
        rows = {name: conversations(chosen) for name, chosen in parts.items()}
        for name, chats in rows.items():
            write_rows(self.folder / "questions" / f"{name}.jsonl", chats)
        said = [message["content"] for chats in rows.values() for row in chats for message in row["messages"]]
        random_model = self._at("random_model")
        random_model.mkdir()
        vocabulary = write_tokenizer(random_model, [*texts, *said], plan.vocabulary)
        shape = Shape(vocabulary, hidden=plan.hidden, layers=plan.layers, intermediate=3 * plan.hidden)
        write_model(random_model, shape, plan.seed)
        self.result.parameters = shape.parameters
        counts = ", ".join(f"{len(rows[name])} to {verb}" for name, verb in _PURPOSES.items())
        self._line(f"a Llama with {shape.parameters:,} random weights, a tokenizer of {vocabulary} tokens")
        self._line(f"{len(texts)} short texts about countries; questions: {counts}")

    def learn_sentences(self) -> None:
        """Turn the random model into one that knows the texts."""
        plan = self.plan
        follower = Follower(self._say, every=max(1, plan.sentence_steps // 5))
        train(
            TrainConfig(
                model=str(self._at("random_model")),
                data=str(self._at("sentences")),
                fine_tune_type="full",
                num_layers=-1,
                batch_size=32,
                val_batches=0,
                adapter_path=str(self._at("sentences_run")),
                seed=plan.seed,
                nodes="local",
                **_cosine(plan.sentence_rate, plan.sentence_steps),
            ),
            follower,
        )
        self.result.sentence_losses = follower.losses
        self._fuse("sentences_run", "base_model", gguf=False)

    def ask_before(self) -> None:
        """What the model answers when nobody has shown it what a question is."""
        options = TestOptions(model=str(self._at("base_model")), data=str(self._at("questions")), mask_prompt=True)
        self._tell_test(test(options, Follower(self._say)))
        self._before = self._answers("base_model")
        self.result.right_before = self._right(self._before)
        for (question, _), answer in self._shown(self._before):
            self._line(f"{question}  {answer or '(nothing)'}")

    def learn_to_answer(self) -> None:
        """Train an adapter on the questions of the training split, on two nodes at once."""
        plan = self.plan
        follower = Follower(self._say, every=max(1, plan.lora_steps // 4))
        config = TrainConfig(
            model=str(self._at("base_model")),
            data=str(self._at("questions")),
            mask_prompt=True,
            num_layers=-1,
            lora_rank=16,
            lora_alpha=32.0,
            batch_size=16,
            val_batches=-1,
            steps_per_eval=plan.lora_steps,
            test=True,
            adapter_path=str(self._at("adapters")),
            seed=plan.seed,
            nodes="auto",
            min_nodes=2,
            force_all=True,
            **_cosine(plan.lora_rate, plan.lora_steps),
        )
        with serving(NODES) as addresses:
            for name, address in zip(NODES, addresses, strict=True):
                self._line(f"node serve --name {name}: on {address}")
            outcome = train(config, follower)
        self.result.lora_losses = follower.losses
        self.result.validation_losses = follower.validations
        self.result.test_after = follower.test
        self.result.files |= {"adapter": str(outcome.folder), "report": str(outcome.folder / "report.html")}

    def fuse(self) -> None:
        """Merge the adapter into the model, and write the form that llama.cpp reads."""
        written = self._fuse("adapters", "fused_model", gguf=True)
        gguf = next(path for path in written if path.endswith(".gguf"))
        self.result.files |= {"base": str(self._at("base_model")), "fused": str(self._at("fused_model")), "gguf": gguf}
        size = Path(gguf).stat().st_size
        self._line(f"fused_model: for mlx_lm; {Path(gguf).name}: {size / 1e6:.1f} MB, for llama.cpp and Ollama")

    def ask_after(self) -> None:
        """The same questions to the fused model, and how many it gets exactly right."""
        after = self._answers("fused_model")
        result = self.result
        result.asked, result.right_after = len(after), self._right(after)
        for (question, expected), answer in self._shown(after):
            remark = "" if answer == expected else f"  (should be: {expected})"
            self._line(f"{question}  {answer or '(nothing)'}{remark}")
        result.answers = [
            {"question": question, "expected": expected, "before": before, "after": answer}
            for (question, expected), before, answer in zip(self._questions, self._before, after, strict=True)
        ]
        before, now = result.test_before, result.test_after
        self._line(f"test loss {before['loss']:.3f} before, {now['loss']:.3f} after")
        self._line(
            f"right answers to {result.asked} questions that were not in its training:"
            f" {result.right_before} before, {result.right_after} after"
        )

    def _tell_test(self, measured: TestResult) -> None:
        self.result.test_before = {"loss": measured.loss, "perplexity": measured.perplexity}
        self._line(f"test: loss {measured.loss:.3f}, perplexity {measured.perplexity:,.1f}")

    def _answers(self, model: str) -> list[str]:
        """Greedy answers of a model to every held-out question."""
        prompts = tuple(question for question, _ in self._questions)
        options = GenerateOptions(model=str(self._at(model)), prompts=prompts, max_tokens=24)
        return [" ".join(answer.text.split()) for answer in generate(options, Follower(self._say))]

    def _right(self, answers: list[str]) -> int:
        return sum(answer == expected for (_, expected), answer in zip(self._questions, answers, strict=True))

    def _shown(self, answers: list[str]) -> list[tuple[tuple[str, str], str]]:
        """The questions to print, the same before and after: spread over the list, so over the kinds of facts."""
        count = min(self.plan.shown, len(answers))
        picked = [len(answers) * number // count for number in range(count)]
        return [(self._questions[number], answers[number]) for number in picked]

    def _fuse(self, adapter: str, target: str, *, gguf: bool) -> tuple[str, ...]:
        options = FuseOptions(adapter_path=str(self._at(adapter)), save_path=str(self._at(target)), export_gguf=gguf)
        return fuse(options, Follower(self._say)).written

    def _at(self, name: str) -> Path:
        return self.folder / name

    def _line(self, text: str) -> None:
        self._say(f"    {text}")


NODES = ("amber", "birch")
_PURPOSES = {"train": "train on", "valid": "validate with", "test": "test with"}


def _cosine(rate: float, steps: int) -> dict[str, Any]:
    """Options of so many steps that warm up over a quarter of them and then fall to 0."""
    warmup = steps // 4
    schedule = {"name": "cosine_decay", "arguments": [rate, max(1, steps - warmup)]}
    return {"iters": steps, "warmup": warmup, "lr_schedule": schedule, "save_every": steps}


@contextlib.contextmanager
def _own_surroundings() -> Iterator[None]:
    """Keep the person's registry and caches out of it, and matrices this small on one thread."""
    with tempfile.TemporaryDirectory(prefix="mlx-tandem-demo-home-") as home:
        own = {"TANDEM_HOME": home, "OPENBLAS_NUM_THREADS": "1", **surroundings()}
        before = {name: os.environ.get(name) for name in own}
        os.environ.update(own)
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value
