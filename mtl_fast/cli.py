"""The `mtl-fast` command, derived from the settings' dataclasses."""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import tyro

from .cli_tools import Build, Data, Doctor, Embed, Export, Import, Predict, Presets, Tune
from .config import (
    RECIPES,
    Config,
    DataConfig,
    EncoderConfig,
    EpisodeConfig,
    EvaluationChanges,
    InnerConfig,
    MetaConfig,
    PretrainConfig,
    ValidationEpisodes,
    ValidationInner,
    preset,
)
from .errors import InputError

# A path that the user named, or one below it, does not let itself be looked at.
_UNREACHABLE = (errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ENOTDIR, errno.ELOOP)
_FULL = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EROFS)
_RANK_TIMEOUT = 600.0  # the default of engine.ranks.join, which --help does not wait for


@dataclass(frozen=True)
class Demo:
    """The whole way on the embedded characters: pre-train, meta-train without and with HT, test, picture."""

    output: Path = Path("runs/demo")
    """Folder for report, pictures, settings and checkpoints."""
    quick: bool = False
    """The same way in 40 seconds: shows that everything works; its numbers mean little."""
    seed: int = 0
    """Seed of everything random."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda`, …"""
    resume: bool = False
    """Go on where a demo in the output folder stopped."""

    def run(self) -> None:
        from .training.demo import demo
        from .training.ranks import refuse_ranks

        refuse_ranks("demo")
        demo(self.output, quick=self.quick, seed=self.seed, device=self.device, resume=self.resume)


@dataclass(frozen=True)
class Results:
    """The demo over several seeds, with fine-tuning and a range of meta learning rates."""

    output: Path = Path("runs/results")
    """Folder of the runs; finished ones are kept, so the command can be given again."""
    publish: Path = Path("docs/results")
    """Folder for the summary: results.json, the table and the pictures."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """One whole experiment a seed."""
    workers: int = 0
    """Runs at a time, one thread each; 0: one a core."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda`, …"""

    def run(self) -> None:
        from .training.ranks import refuse_ranks
        from .training.results import results

        refuse_ranks("results")
        results(self.output, self.publish, seeds=self.seeds, workers=self.workers, device=self.device)


@dataclass(frozen=True, kw_only=True)
class Ablation:
    """Every row of the paper's ablation, plain and with hard tasks: one table, the claims, the convergence figure."""

    output: Path = Path("runs/ablation")
    """Folder of the runs; finished ones are kept, so the command can be given again."""
    publish: Path = Path("docs/ablation")
    """Folder for the table (Markdown, CSV, LaTeX), the figure and ablation.json."""
    preset: str = "paper"
    """Recipe of the rows that adapt the head; those of MAML have their own."""
    data: DataConfig
    rows: tuple[str, ...] = ()
    """Keys of the rows, such as ss ss-ht; none: all."""
    shots: tuple[int, ...] = (1, 5)
    """Support images a class; rates are chosen at the first."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """One pre-trained network a seed."""
    whole_network_shots: tuple[int, ...] = (1,)
    """Support images a class of the rows that adapt all weights, which take long."""
    whole_network_seeds: tuple[int, ...] = (0,)
    """Their seeds."""
    test_tasks: int = 2000
    """Test tasks a seed, the same for all rows."""
    whole_network_tasks: int = 600
    """How many of them the rows that adapt all weights are tested on."""
    rates: str = "preset"
    """Meta learning rates: the `preset`'s; a `grid`, chosen on the validation split; or a results.json."""
    plan: bool = False
    """Only print the runs that are missing and their estimated hours."""
    finished: bool = False
    """Publish what is finished, and make nothing."""
    workers: int = 1
    """Runs at a time, one thread each; 0: one a core."""
    outcomes: Path | None = None
    """File of finished runs, such as docs/ablation/outcomes.jsonl: those are not made again, new ones are added, so
    machines can share the work."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda`, …"""

    def run(self) -> None:
        from .training.ablation import ablation
        from .training.ranks import refuse_ranks

        refuse_ranks("ablation")
        options = {name: getattr(self, name) for name in self.__dataclass_fields__}
        ablation(options.pop("output"), options.pop("publish"), recipe=options.pop("preset"), **options)


@dataclass(frozen=True, kw_only=True)
class _Run:
    """What both trainings ask for."""

    output: Path
    """Folder of this run."""
    preset: str = "paper"
    """Recipe that gives every setting its default; `mtl-fast presets` shows them."""
    seed: int = 0
    """Seed of everything random."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda`, …"""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Of the encoder in training; everything else, validation and test stay in fp32."""
    resume: bool = False
    """Go on where the run in the output folder stopped."""
    rank_timeout: float = _RANK_TIMEOUT
    """With torchrun: seconds that one rank may keep the others waiting before the run ends."""
    profile: bool = False
    """Write profile.json into the output folder: a trace of the first updates, which Perfetto opens."""
    data: DataConfig

    def config(self, **parts: Any) -> Config:
        """The recipe with this command's settings."""
        common = {name: getattr(self, name) for name in ("data", "seed", "device", "precision")}
        return replace(preset(self.preset), **common, **parts)


@dataclass(frozen=True, kw_only=True)
class Pretrain(_Run):
    """Pre-train an encoder on all training classes; the best epoch by 1-shot validation episodes is kept, or the last."""

    encoder: EncoderConfig
    pretrain: PretrainConfig
    episodes: ValidationEpisodes
    inner: ValidationInner

    def run(self) -> None:
        from .training.pretrain import pretrain
        from .training.ranks import command_ranks

        recipe = preset(self.preset)
        config = self.config(
            encoder=self.encoder,
            pretrain=self.pretrain,
            episodes=replace(recipe.episodes, **vars(self.episodes)),
            inner=replace(recipe.inner, **vars(self.inner)),
        )
        options = {"resume": self.resume, "profile": self.profile}
        with command_ranks(self.device, self.rank_timeout) as ranks:
            path = pretrain(config, self.output, **options, ranks=ranks)
            ranks.say(f"pre-trained encoder: {path}")


@dataclass(frozen=True, kw_only=True)
class MetaTrain(_Run):
    """Learn scale and shift (or weights) and the head's start across tasks, with or without hard tasks."""

    pretrained: Path | None = None
    """Model file, or run folder, of `mtl-fast pretrain`; None starts from random weights (presets of MAML)."""
    episodes: EpisodeConfig
    inner: InnerConfig
    meta: MetaConfig

    def run(self) -> None:
        from .training.meta_train import meta_train
        from .training.ranks import command_ranks

        config = self.config(episodes=self.episodes, inner=self.inner, meta=self.meta)
        options = {"resume": self.resume, "profile": self.profile}
        with command_ranks(self.device, self.rank_timeout) as ranks:
            path = meta_train(config, self.pretrained, self.output, **options, ranks=ranks)
            ranks.say(f"meta-trained model: {path}")


@dataclass(frozen=True)
class Evaluate:
    """Mean accuracy ± 95 % interval over test tasks, of a pre-trained or a meta-trained model, or of features."""

    checkpoint: Path | None = None
    """Model file, or run folder, of `pretrain` (a fresh head is fitted) or `meta-train`."""
    embeddings: Path | None = None
    """Instead of a model: features of `mtl-fast embed` or from elsewhere, tensors `features` [N, D] and `labels` [N]."""
    data: str | None = None
    """Another data source than the one trained on; normalised as in training."""
    n_way: int | None = None
    """Classes a task; by default as trained."""
    n_shot: int | None = None
    """Support images a class; by default as trained."""
    n_query: int | None = None
    """Query images a class; by default as trained."""
    inner_steps: int | None = None
    """Steps of the inner loop; by default the model's."""
    inner_lr: float | None = None
    """Its step size; by default the model's."""
    adapt: Literal["head", "all"] | None = None
    """What it moves: the head, or all weights of the network; by default as trained."""
    head: Literal["learned", "zeros"] = "learned"
    """Where heads start: as meta-learned, where they were, or from zeros, for any number of classes."""
    by_step: bool = False
    """Accuracy after each step of the inner loop too; with an output also as CSV and picture."""
    evaluation: EvaluationChanges = field(default_factory=EvaluationChanges)
    seed: int = 0
    """Seed of the test tasks."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda`, …"""
    output: Path | None = None
    """Folder for evaluation.json and the accuracy of each task; None writes nothing."""
    resume: bool = False
    """Go on where a test in the output folder stopped, and put together what its shards did."""
    shard: str | None = None
    """I/N: score only share I of N; then `--resume` without it gives the result of all."""
    rank_timeout: float = _RANK_TIMEOUT
    """With torchrun: seconds that one rank may keep the others waiting before the test ends."""

    def run(self) -> None:
        from .training.evaluate import evaluate_model
        from .training.ranks import command_ranks

        options = {name: getattr(self, name) for name in self.__dataclass_fields__}
        with command_ranks(self.device, options.pop("rank_timeout")) as ranks:
            score = evaluate_model(**options, ranks=ranks)
            ranks.say(str(score))
            if self.by_step:
                ranks.say(score.steps_text())


def commands(config: Config) -> dict[str, Any]:
    """The commands with the defaults of a recipe."""
    common: dict[str, Any] = {"output": tyro.MISSING, "data": config.data}
    shape, inner = config.episodes, config.inner
    validation: dict[str, Any] = {
        "episodes": ValidationEpisodes(shape.n_way, shape.n_query),
        "inner": ValidationInner(inner.lr, inner.test_lr, inner.test_steps),
    }
    return {
        "demo": Demo(),
        "pretrain": Pretrain(**common, encoder=config.encoder, pretrain=config.pretrain, **validation),
        "meta-train": MetaTrain(**common, episodes=shape, inner=inner, meta=config.meta),
        "evaluate": Evaluate(),
        "embed": Embed(tyro.MISSING, tyro.MISSING),
        "predict": Predict(tyro.MISSING),
        "import": Import(tyro.MISSING, tyro.MISSING),
        "export": Export(tyro.MISSING, tyro.MISSING, tyro.MISSING),
        "presets": Presets(),
        "data": Data(tyro.MISSING, tyro.MISSING),
        "results": Results(),
        "ablation": Ablation(data=config.data),
        "build": Build(),
        "tune": Tune(),
        "doctor": Doctor(),
    }


def _preset_of(arguments: Sequence[str]) -> Config:
    """The recipe that the arguments name; its values are the defaults that tyro shows and fills in."""
    name = "paper"
    for i, argument in enumerate(arguments):
        if argument == "--preset" and i + 1 < len(arguments):
            name = arguments[i + 1]
        elif argument.startswith("--preset="):
            name = argument.partition("=")[2]
    return preset(name)


def parse(arguments: Sequence[str]) -> Any:
    """The command that the arguments ask for, ready to `run()`.

    Raises:
        InputError: an unknown recipe.
        SystemExit: `--help` (status 0), or options that do not exist or miss (status 2); tyro says which.
    """
    defaults = commands(_preset_of(arguments))
    kind = tyro.extras.subcommand_type_from_defaults(defaults, {k: v.__doc__ for k, v in defaults.items()})
    description = (
        "Meta-transfer learning for few-shot classification. Start with: mtl-fast demo. "
        f"Recipes for --preset: {', '.join(RECIPES)}, glyphs; mtl-fast presets shows them."
    )
    return tyro.cli(
        kind,
        prog="mtl-fast",
        description=description,
        args=arguments,
        config=(tyro.conf.FlagCreatePairsOff,),
    )


@contextmanager
def _told_once() -> Iterator[None]:
    """What is wrong with the arguments, or their help, all processes of torchrun would tell: the first does."""
    if os.environ.get("RANK", "") in ("", "0"):
        yield
        return
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        try:
            yield
        except InputError:
            sys.exit(2)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit status: 2 for wrong input (one line says what), 130 for Ctrl-C."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="surrogateescape")  # names of files are printed though they be no text
    try:
        with _told_once():
            command = parse(list(sys.argv[1:] if arguments is None else arguments))
        from .training.run import Interrupted

        try:
            status: int | None = command.run()
            sys.stdout.flush()
        except Interrupted as stopped:
            print(f"mtl-fast: {stopped}", file=sys.stderr)
            return 130
    except InputError as error:
        print(f"mtl-fast: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            "mtl-fast: interrupted; what was saved is kept, and --resume goes on from there", file=sys.stderr
        )
        return 130
    except BrokenPipeError:
        # The reader went away (`… --help | head`).
        _drop_output()
        return 141
    except OSError as error:
        if error.errno in _UNREACHABLE and error.filename is not None:
            print(f"mtl-fast: error: {error.filename}: {error.strerror}", file=sys.stderr)
            return 2
        if error.errno not in _FULL:
            raise
        where = error.filename or "the output"
        print(
            f"mtl-fast: error: {where}: cannot be written ({error.strerror}); free some space",
            file=sys.stderr,
        )
        if error.filename is None:
            _drop_output()
        return 2
    return status or 0


def _drop_output() -> None:
    """What is left of the output goes nowhere: Python must not fail again when it flushes it at the end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main())
