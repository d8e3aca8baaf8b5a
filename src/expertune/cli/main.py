"""The commands. Each imports what it needs when it runs, so that `--help` and a wrong configuration answer at once.

Exit codes: 0 done, 1 failed (or stopped by a signal), 2 wrong use: arguments, configuration or data.
"""

import os
import shlex
import sys
from enum import StrEnum
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from expertune.cli.bench import bench
from expertune.cli.estimate import estimate
from expertune.cli.failing import reporting_errors
from expertune.cli.launch import launch
from expertune.cli.output import Output
from expertune.cli.tune import tune
from expertune.errors import ConfigError, ExpertuneError

if TYPE_CHECKING:
    from expertune.train.config import TrainConfig

app = typer.Typer(
    name="expertune",
    help="Fast, exact LoRA fine-tuning of Mixture-of-Experts language models.",
    no_args_is_help=True,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Every key that a CONFIG can have: [bold]expertune config[/]",
    pretty_exceptions_show_locals=False,
    rich_markup_mode="rich",
)


class Server(StrEnum):
    """The servers that `export` writes for."""

    vllm = "vllm"
    sglang = "sglang"


ConfigOrRun = Annotated[
    Path, typer.Argument(metavar="CONFIG", help="A YAML file, or the output_dir of a run.", show_default=False)
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key, as in --set lora_r=32. May be repeated."),
]
Adapter = Annotated[
    Path | None, typer.Option("--adapter", help="An adapter's folder instead of the run's own.", show_default=False)
]


@app.command()
def train(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML file.", show_default=False)],
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the newest checkpoint.")] = False,
) -> None:
    """Fine-tune as CONFIG says; leaves the adapter, checkpoints and a report in its output_dir."""
    console = Output()
    with reporting_errors():
        from expertune.train.config import load_config

        loaded = load_config(config, overrides or [])
        is_first = os.environ.get("RANK", "0") == "0"  # of torchrun's processes, the one that talks
        for note in loaded.notes if is_first else ():
            console.print(f"note: {note}", markup=False)

        from expertune.cli.quiet import quiet_libraries
        from expertune.cli.render import print_run_report
        from expertune.train.run import train as run_training

        quiet_libraries()
        again = [
            *_program_again(),
            shlex.quote(str(config)),
            *(f"--set {shlex.quote(item)}" for item in overrides or []),
            "--resume",
        ]
        report = run_training(loaded.config, console, resume=resume, resume_command=" ".join(again))
        if is_first:
            print_run_report(report, Path(loaded.config.output_dir), console)


@app.command("eval")
def evaluate(config: ConfigOrRun, adapter: Adapter = None, overrides: Overrides = None) -> None:
    """Compute the held-out loss of the base model and of the adapter."""
    console = Output()
    with reporting_errors():
        from expertune.train.evaluate import evaluate as run_evaluation

        settings = _settings_of(config, overrides)
        losses = run_evaluation(settings, console, adapter=_adapter_of(settings, adapter))
        console.print(f"held-out loss of the base model    {losses['base']:.4f}")
        console.print(f"held-out loss with the adapter     {losses['adapter']:.4f}")


@app.command()
def generate(
    config: ConfigOrRun,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="Answer this and exit; without it, chat.", show_default=False)
    ] = None,
    adapter: Adapter = None,
    base: Annotated[bool, typer.Option("--base", help="Use the base model without an adapter.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest reply, in tokens.")] = 200,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token.")] = 0.0,
    overrides: Overrides = None,
) -> None:
    """Answer one prompt, or hold a chat (an empty line or Ctrl-D ends it)."""
    console = Output()
    with reporting_errors():
        from expertune.train.generation import reply
        from expertune.train.use import load_for_use

        if prompt is not None and not prompt.strip():
            raise ConfigError("--prompt: is empty; give a text, or leave --prompt out to chat")
        if base and adapter is not None:
            raise ConfigError("--base, --adapter: one asks for no adapter, the other names one; remove one of them")
        settings = _settings_of(config, overrides)
        loaded = load_for_use(settings, adapter=None if base else _adapter_of(settings, adapter))
        stop_tokens = tuple(settings.eot_tokens or ())

        def answer(to: str | list[dict[str, str]]) -> str:
            return reply(
                loaded.model,
                loaded.tokenizer,
                to,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                stop_tokens=stop_tokens,
            )

        if prompt is not None:
            typer.echo(answer(prompt))
            return
        messages: list[dict[str, str]] = []
        while line := _ask(console):
            messages.append({"role": "user", "content": line})
            text = answer(messages if loaded.tokenizer.chat_template else line)
            messages.append({"role": "assistant", "content": text})
            typer.echo(text)


@app.command()
def merge(
    config: ConfigOrRun,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="A new folder for the checkpoint.", show_default=False)
    ],
    adapter: Adapter = None,
    overrides: Overrides = None,
) -> None:
    """Merge the adapter into a full checkpoint, and check it against the unmerged model."""
    console = Output()
    with reporting_errors():
        from expertune.train.merge import merge as run_merge

        settings = _settings_of(config, overrides)
        report = run_merge(settings, _adapter_of(settings, adapter), output)
        console.print(
            f"merged into {report.folder}; read back, its logits differ from the unmerged model's by "
            f"{report.relative_error:.1e} (allowed: {report.tolerance:.0e}; the adapter itself changes them by "
            f"{report.adapter_effect:.1e})",
            markup=False,
        )


@app.command()
def export(
    config: ConfigOrRun,
    output: Annotated[Path, typer.Option("--output", "-o", help="A new folder for the adapter.", show_default=False)],
    server: Annotated[
        Server, typer.Option("--format", help="The server that will load the adapter.", show_default=False)
    ],
    adapter: Adapter = None,
    overrides: Overrides = None,
) -> None:
    """Write the adapter as per-expert LoRA for vLLM or SGLang (docs/export.md)."""
    console = Output()
    with reporting_errors():
        from expertune.train.export import export as run_export

        settings = _settings_of(config, overrides)
        report = run_export(settings, _adapter_of(settings, adapter), output, server.value)
        console.print(
            f"wrote {report.folder} in the format that {report.read} reads: {report.num_tensors} tensors, "
            f"rank {report.rank}",
            markup=False,
        )
        for note in report.notes:
            console.print(f"note: {note}", markup=False)
        console.print(f"next: {report.start}", markup=False)


@app.command()
def audit(config: ConfigOrRun, adapter: Adapter = None, overrides: Overrides = None) -> None:
    """Look for missing or broken expert adapters, and for experts that never received a token."""
    console = Output()
    with reporting_errors():
        from expertune.integrations.audit import audit as audit_saved
        from expertune.train.export import open_saved

        settings = _settings_of(config, overrides)
        found = audit_saved(open_saved(settings, _adapter_of(settings, adapter)))
        if found.problems:
            raise ExpertuneError("the adapter is not whole:\n" + "\n".join(f"  {line}" for line in found.problems))
        for line in found.in_words():
            console.print(line, markup=False)


@app.command()
def doctor() -> None:
    """Show versions, the GPU, and which expert backends can run here, or why not."""
    with reporting_errors():
        from expertune.cli.doctor import print_doctor

        print_doctor(Output())


app.command()(estimate)
app.command()(launch)
app.command()(bench)
app.command()(tune)


@app.command("config")
def show_config(
    key: Annotated[
        str | None, typer.Argument(metavar="KEY", help="Only this key, or keys that contain it.", show_default=False)
    ] = None,
    json_schema: Annotated[bool, typer.Option("--json-schema", help="Print the JSON schema instead.")] = False,
) -> None:
    """List every key of a configuration with its type, default and meaning."""
    with reporting_errors():
        from expertune.cli.render import print_config_keys, print_json_schema

        if json_schema:
            print_json_schema()
        else:
            print_config_keys(Output(), key)


def _program_again() -> list[str]:
    """The start of the command that goes on with a training run, in as many processes as this one has."""
    from expertune.cli.render import program

    processes = os.environ.get("WORLD_SIZE", "1")
    if processes == "1":
        return [program(), "train"]
    if processes == os.environ.get("LOCAL_WORLD_SIZE"):
        return [program(), "launch", "--nproc", processes]
    return ["torchrun", "(as before)", "-m", "expertune", "train"]  # on each machine


def _settings_of(config: Path, overrides: list[str] | None) -> "TrainConfig":
    """The configuration of a run that is put to use, once the libraries are quiet."""
    from expertune.cli.quiet import quiet_libraries
    from expertune.train.use import config_of

    quiet_libraries()
    return config_of(config, overrides or [])


def _adapter_of(settings: "TrainConfig", given: Path | None) -> Path:
    """The adapter to use; says so where it is not the one that a finished run leaves."""
    from expertune.train.use import find_adapter

    folder = find_adapter(settings, given)
    if given is None and folder.name != "adapter":
        Output(stderr=True).print(f"note: the run is not finished; using its newest checkpoint, {folder}", markup=False)
    return folder


def _ask(console: Output) -> str:
    """The next line of a chat, "" at its end. What is not typed at a terminal needs no prompt."""
    try:
        return console.input("[bold]you:[/] " if console.is_terminal else "").strip()
    except EOFError:
        if console.is_terminal:
            console.print()  # the shell's prompt gets a line of its own
        return ""


def _version(show: bool) -> None:
    if show:
        import expertune

        typer.echo(f"expertune {expertune.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Fast, exact LoRA fine-tuning of Mixture-of-Experts language models."""


def main() -> None:
    """Entry point of the `expertune` command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")  # an ASCII-only terminal gets a ?, not a traceback
    app()
