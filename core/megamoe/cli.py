"""The command line: each command is a few lines that call the module of its name."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from megamoe import __version__
from megamoe.errors import MegamoeError

app = typer.Typer(
    name="megamoe",
    help="NVFP4 fused kernels for mixture-of-experts inference, each used only where it has been proven.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
console = Console(highlight=False, width=None if sys.stdout.isatty() else 150)

ConfigOption = Annotated[Path | None, typer.Option("--config", help="Configuration file to read instead.")]
StageOption = Annotated[
    list[str] | None, typer.Option("--stage", metavar="ID=VALUE", help="Choice for one stage or item; repeatable.")
]
ArchOption = Annotated[str | None, typer.Option("--arch", help="sm_90, sm_100, ... or cpu; default: this machine.")]
JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; a mistake of the user's is one line on stderr and exit code 2."""
    try:
        result = app(args=list(argv) if argv is not None else None, standalone_mode=False)
    except MegamoeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except typer.Exit as stop:
        return stop.exit_code
    except typer.Abort:
        return 130
    except Exception as error:
        if hasattr(error, "format_message"):  # click's own usage errors
            print(f"error: {error.format_message()}", file=sys.stderr)
            return 2
        raise
    return int(result or 0)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"megamoe {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    pass


@app.command()
def run(
    model: Annotated[
        Path | None, typer.Option(help="A Hugging Face checkpoint folder; default: a small model.")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="Text to continue.")] = None,
    file: Annotated[Path | None, typer.Option(help="File with the text to continue.")] = None,
    decode: Annotated[int, typer.Option(min=0, help="Tokens to decode after the prefill.")] = 16,
    max_prompt: Annotated[int | None, typer.Option(min=1, help="Drop the prompt's tokens beyond this many.")] = None,
    config: ConfigOption = None,
    stage: StageOption = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[
        str | None,
        typer.Option(help="bfloat16, float16 or float32; default: the checkpoint's; small model: fp32 on a CPU."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the small model.")] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write everything as JSON.")] = None,
) -> None:
    """Run a DeepSeek-V4 model with its stages enabled and report what ran; exit 1 when an op is out of bounds."""
    from megamoe import job, report

    options = job.RunOptions(
        model=model,
        prompt=prompt,
        file=file,
        decode=decode,
        max_prompt=max_prompt,
        config=_config(config, stage),
        device=device,
        dtype=dtype,
        seed=seed,
    )
    result = job.run(options, console)
    report.show_run(console, result)
    if json_file is not None:
        _write(json_file, result.to_json())
    if not result.ok:
        raise typer.Exit(1)


@app.command()
def roadmap(
    as_json: JsonFlag = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the table of ROADMAP.md.")] = False,
    write: Annotated[bool, typer.Option("--write", help="Refresh ROADMAP.md between its markers.")] = False,
    check: Annotated[bool, typer.Option("--check", help="Exit 1 when ROADMAP.md is out of date.")] = False,
) -> None:
    """Report every roadmap item: status, blockers, what is proven on each promised architecture, what is used here."""
    from megamoe import report
    from megamoe import roadmap as roadmaps
    from megamoe.runtime import runtime

    current = runtime()
    rows = roadmaps.report(current, shipped_only=markdown or write or check)
    if write or check:
        path = roadmaps.path()
        text = path.read_text()
        fresh = roadmaps.refreshed(text, rows)
        if check and fresh != text:
            print(f"{path.name} is out of date: run `megamoe roadmap --write`", file=sys.stderr)
            raise typer.Exit(1)
        if write:
            path.write_text(fresh)
        print(f"{path.name} is {'up to date' if fresh == text else 'refreshed'}")
    elif as_json:
        print(roadmaps.as_json(rows))
    elif markdown:
        print(roadmaps.as_markdown(rows))
    else:
        report.show_roadmap(console, rows, current.machine())


@app.command()
def explain(
    stage: Annotated[str | None, typer.Argument(help="Stage or item id; default: all stages.")] = None,
    arch: ArchOption = None,
    problem: Annotated[
        list[str] | None, typer.Option("--problem", metavar="FACT=VALUE", help="A fact of the problem; repeatable.")
    ] = None,
    config: ConfigOption = None,
    stage_choice: StageOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Say which variant of a stage would run, and every reason against the others; exit 1 when none can."""
    from dataclasses import asdict

    from megamoe import report
    from megamoe.dispatch import NoVariantError
    from megamoe.runtime import runtime

    current = runtime()
    settings = _config(config, stage_choice)
    stages = [current.stage(stage)] if stage else list(current.stages.values())
    machine = current.machine(_arch(arch))
    out: list[dict[str, Any]] = []
    failed = False
    for one in stages:
        try:
            decision = current.decide(one, machine, settings, _facts(problem))
        except NoVariantError as error:
            failed = True
            print(error)
            continue
        out.append(asdict(decision))
        if not as_json:
            print(report.explanation(decision, machine, one, list(current.registry.of_stage(one.id))), end="\n\n")
    if as_json:
        print(json.dumps(out, indent=1, default=str))
    if failed:
        raise typer.Exit(1)


@app.command()
def verify(
    stage: Annotated[str | None, typer.Argument(help="Stage or item id; default: all stages.")] = None,
    variant: Annotated[str | None, typer.Option(help="Only this variant.")] = None,
    case: Annotated[list[str] | None, typer.Option(help="Only this case; repeatable. Nothing is recorded.")] = None,
    ship: Annotated[
        bool, typer.Option("--ship", help="Write passing records of fused variants into the tree.")
    ] = False,
    cpu: Annotated[bool, typer.Option("--cpu", help="On the CPU although there is a GPU.")] = False,
    emulate: Annotated[bool, typer.Option("--emulate", help="In the PTX emulator; needs --arch, and no GPU.")] = False,
    arch: Annotated[str | None, typer.Option(help="What to emulate: sm_90, sm_100.")] = None,
    timeout: Annotated[float, typer.Option(help="Seconds for one variant.")] = 600.0,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="A line a variant.")] = False,
) -> None:
    """Try variants on every case, each in its own process, and record the evidence; exit 1 when one fails."""
    from megamoe import report
    from megamoe import verify as verifier
    from megamoe.errors import UnknownNameError
    from megamoe.model import CaseResult, Role
    from megamoe.runtime import runtime

    current = runtime()
    if emulate != (arch is not None) or (emulate and cpu):
        raise typer.BadParameter("--emulate goes with --arch and without --cpu", param_hint="--emulate")
    machine = current.machine(_arch(arch)) if arch else current.machine(None) if cpu else current.machine()
    stages = [current.stage(stage)] if stage else list(current.stages.values())
    if variant and not any(v.name == variant for s in stages for v in s.variants):
        raise UnknownNameError("variant", variant, {v.name for s in stages for v in s.variants})
    failed = False
    for one in stages:
        print(f"{one.id}: {one.title}")
        for candidate in one.variants:
            if (variant and candidate.name != variant) or (emulate and candidate.role is not Role.FUSED):
                continue
            if refused := current.hard_refusals(one, candidate, machine):
                print(f"{candidate.name}: not here: {refused[0].reason}")
                continue
            if not verifier.case_names(one, device="cuda" if machine.arch and not emulate else "cpu", only=case or ()):
                print(f"{candidate.name}: no case suits this device")
                continue

            def show(name: str, result: CaseResult | None, reason: str) -> None:
                if not quiet or (result and not result.passed):
                    print(report.case_line(name, result, reason))

            found = verifier.verify(
                one, candidate, machine, only=case or (), timeout=timeout, progress=show, emulate=emulate
            )
            if not found.cases:
                print(f"{candidate.name}: refuses every case")
                continue
            print(report.evidence_line(found))
            failed |= not found.ok
            if not case:
                path = verifier.record(found, one, ship=ship and found.ok and candidate.role is Role.FUSED)
                print(f"recorded in {path}")
    if failed:
        raise typer.Exit(1)


@app.command()
def bench(
    stage: Annotated[str | None, typer.Argument(help="Stage or item id; default: all stages.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Few rounds: whether it works, not how fast it is.")] = False,
    sweep: Annotated[bool, typer.Option("--sweep", help="Times against size beside the roof; needs a GPU.")] = False,
    part: Annotated[str | None, typer.Option(metavar="NAME", help="Sweep another part of the stage.")] = None,
    only: Annotated[str, typer.Option(metavar="TEXT", help="Sweep sizes whose names hold all these words.")] = "",
    seconds: Annotated[float, typer.Option(help="Begin no size of a sweep later than this.")] = float("inf"),
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw a sweep (PNG, SVG), new or from --json.")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Where the results go.")] = None,
) -> None:
    """Compare the variants of each op with pytest-benchmark; each is checked before it is timed."""
    from megamoe.runtime import runtime
    from megamoe.testing import suite

    stage_id = runtime().stage(stage).id if stage else None
    if sweep or plot:
        if stage_id is None:
            raise typer.BadParameter("name the stage to sweep", param_hint="STAGE")
        _sweep(stage_id, sweep, plot, json_file, part=part, only=only, seconds=seconds)
        return
    for option, given in (("--part", part is not None), ("--only", bool(only)), ("--seconds", seconds < float("inf"))):
        if given:
            raise typer.BadParameter("goes with --sweep", param_hint=option)
    raise typer.Exit(suite.bench(stage_id, quick=quick, json_file=json_file))


@app.command("compile")
def compile_kernels(
    stage: Annotated[str | None, typer.Argument(help="Stage or item id; default: all stages.")] = None,
    arch: Annotated[str | None, typer.Option(help="sm_90a or sm_100a; default: every one.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Compile what the cache holds too.")] = False,
    ship: Annotated[bool, typer.Option("--ship", help="Write records of kind `compiled` into the tree.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Compile the kernels, with or without a GPU, and show what came out; exit 1 when one has a fault (a spill)."""
    from megamoe import verify as verifier
    from megamoe.cute import report as compiled
    from megamoe.runtime import runtime

    current = runtime()
    stages = [current.stage(stage)] if stage else list(current.stages.values())
    rows = list(compiled.compile_all(stages, _arch(arch) if arch else None, fresh=fresh))
    if as_json:
        print(json.dumps([compiled.as_dict(row) for row in rows], indent=1))
    else:
        console.print(compiled.table(rows))
    faulty = [row for row in rows if row.kernel.faults]
    for row in faulty:
        print(f"{row.spec.name} ({row.spec.arch}): {'; '.join(row.kernel.faults)}", file=sys.stderr)
    if faulty:
        raise typer.Exit(1)
    if ship:
        for record in compiled.records(rows, current.stages, current.machine().packages):
            print(f"recorded in {verifier.record(record, current.stages[record.stage], ship=True)}")


@app.command()
def config(
    file: ConfigOption = None,
    stage: StageOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Print the effective configuration and where each value came from."""
    from dataclasses import asdict

    from megamoe import report
    from megamoe.runtime import runtime

    settings = _config(file, stage) or runtime().default_config
    if as_json:
        print(json.dumps(asdict(settings), indent=1))
    else:
        report.show_config(console, settings, runtime().stages)


@app.command()
def doctor(as_json: JsonFlag = False) -> None:
    """Check the installation; exit 1 when something is broken."""
    from dataclasses import asdict

    from megamoe import doctor as doctors

    findings = doctors.examine()
    if as_json:
        print(json.dumps([asdict(f) for f in findings], indent=1))
    else:
        for finding in findings:
            print(f"{finding.state:<5} {finding.what:<12} {finding.detail}")
    if any(f.state == "bad" for f in findings):
        raise typer.Exit(1)


@app.command()
def new(
    stage: Annotated[str, typer.Argument(help="Id of the new op, a Python name.")],
    item: Annotated[str, typer.Option(help="Id of its roadmap item.")],
    title: Annotated[str, typer.Option(help="One line for the roadmap.")] = "",
) -> None:
    """Write the folder of a new stage, with a test and a registry item, ready to be filled in."""
    from megamoe import scaffold

    for path in scaffold.create(stage, item=item, title=title or stage.replace("_", " ")):
        print(f"wrote {path}")


def _sweep(stage_id: str, measure: bool, plot: Path | None, json_file: Path | None, **which: Any) -> None:
    """Measures a sweep, or reads one from `json_file`; prints its sizes as they come and its table, draws its plot."""
    from megamoe.runtime import runtime
    from megamoe.testing import roofline

    if measure or json_file is None:
        points = []
        for point in roofline.sweep(runtime().stages[stage_id], **which):
            points.append(point)
            print(f"{point.case}: {point.us}", file=sys.stderr, flush=True)
            if json_file is not None:
                roofline.write(points, json_file)  # at once: a sweep that is stopped leaves what it has measured
    else:
        points = roofline.read(json_file)
    print(roofline.table(points))
    if plot is not None:
        roofline.plot(points, plot)


def _config(path: Path | None, choices: list[str] | None) -> Any:
    """The configuration for --config and --stage, or None when neither was given."""
    from megamoe import config as configs
    from megamoe.runtime import runtime

    if path is None and not choices:
        return None
    pairs = [_pair("--stage", choice) for choice in choices or ()]
    return configs.load(runtime().names, path, dict(pairs))


def _pair(option: str, text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals or not key or not value:
        raise typer.BadParameter(f"{text!r} is not of the form ID=VALUE", param_hint=option)
    return key, value


def _arch(text: str | None) -> Any:
    from megamoe.model import Arch

    if text is None:
        return "here"
    if text == "cpu":
        return None
    try:
        return Arch.parse(text)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--arch") from error


def _facts(pairs: list[str] | None) -> dict[str, str | int | float | bool] | None:
    if not pairs:
        return None
    facts: dict[str, str | int | float | bool] = {}
    for key, value in (_pair("--problem", pair) for pair in pairs):
        try:
            facts[key] = json.loads(value.lower() if value in ("True", "False") else value)
        except json.JSONDecodeError:
            facts[key] = value
    return facts


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text + "\n")
    except OSError as error:
        raise MegamoeError(f"--json {path}: {(error.strerror or str(error)).lower()}") from error
