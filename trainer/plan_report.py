"""What `stowage plan` says: bytes by kind at the peak of each phase, what binds, and what would need less."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from trainer.display.plots import KIND_COLORS
from trainer.display.view import RunInfo
from trainer.memory import KINDS, Peak, beside_text, format_bytes
from trainer.memory.timeline import BETWEEN
from trainer.plan import Plan
from trainer.precision import precision_text
from trainer.schema import Config, Device

Instead = Mapping[str, Plan]
"""Plans of other choices, by the override that makes each."""


def plan_text(cfg: Config, plan: Plan, instead: Instead, untried: Sequence[str], width: int = 100) -> str:
    """Return the report as text without colour."""
    console = Console(file=io.StringIO(), width=width, color_system=None, force_terminal=False, legacy_windows=False)
    console.print(plan_report(cfg, plan, instead, untried))
    assert isinstance(console.file, io.StringIO)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines()) + "\n"


def plan_report(cfg: Config, plan: Plan, instead: Instead, untried: Sequence[str]) -> RenderableType:
    """Lay out the report for a console of 80 columns or more.

    Args:
        untried: overrides of choices that there was no time to plan.
    """
    parts: list[RenderableType] = [headline(cfg, plan), Text(), phases_table(plan), Text(), binding(plan, instead)]
    parts += [Text(line) for line in beside(plan)]
    if instead:
        parts += [Text(), instead_table(plan, instead)]
    if untried:
        parts.append(Text(f"Not tried, as planning each takes long: {', '.join(untried)}", "dim"))
    return Group(*parts, Text(), Text(remark(cfg, plan), "dim"))


def headline(cfg: Config, plan: Plan) -> Text:
    """Say what is planned, and what one rank, or those that share its rows, do in one step."""
    degree = cfg.parallel.degree(plan.ranks)
    micro_steps = cfg.train.global_batch // (plan.ranks // degree) // cfg.train.micro_batch
    each = f"{plural(micro_steps, 'micro-step')} of {plural(cfg.train.micro_batch, 'sequence')}"
    sharing = f"{degree} ranks that share rows" if degree > 1 else "rank"
    share = "a step" if plan.ranks == 1 else f"a step of each {sharing}"
    return Text.assemble((info(cfg, plan).facts(), "bold"), f"\n{share}: {each} of {cfg.data.sequence_length} tokens")


def info(cfg: Config, plan: Plan) -> RunInfo:
    """Describe the planned run as its display would."""
    return RunInfo(
        name=cfg.run.name,
        model=cfg.model.name if cfg.model.path is None else Path(cfg.model.path).name,
        parameters=plan.parameters,
        optimizer=cfg.optim.name,
        device=plan.device if cfg.run.device is Device.auto else cfg.run.device.value,
        ranks=plan.ranks,
        precision=precision_text(cfg.precision),
    )


def phases_table(plan: Plan) -> Table:
    """Lay out the peaks of the phases, the highest marked; both steps in one where they hold the same."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1, 0, 0))
    table.add_column("peak of", no_wrap=True)
    for kind in KINDS:
        table.add_column(Text(kind, KIND_COLORS[kind]), justify="right", no_wrap=True)
    table.add_column("total", justify="right", no_wrap=True)
    peaks = {name: timeline.peak_by_phase for name, timeline in plan.steps.items()}
    alike = len({str(found) for found in peaks.values()}) == 1
    for name in [plan.highest] if alike else peaks:
        table.add_row("every step" if alike else f"{name} step", style="bold")
        for phase, peak in peaks[name].items():
            highest = name == plan.highest and phase == plan.peak.phase
            if phase != BETWEEN or highest:
                mark = "> " if highest else "  "
                sizes = [format_bytes(peak.by_kind[kind]) for kind in KINDS]
                table.add_row(f"{mark}{phase}", *sizes, format_bytes(peak.total), style="bold" if highest else "")
    return table


def binding(plan: Plan, instead: Instead) -> Text:
    """Say how much is needed, when, what most of it is, and which choice would lower it most."""
    peak = plan.peak
    most = max(KINDS, key=lambda kind: peak.by_kind[kind])
    share = 100 * peak.by_kind[most] / peak.total
    text = Text.assemble((f"{format_bytes(peak.total)} at the most", "bold"), f", in {place(plan)}; ")
    text.append(f"{share:.0f}% of that are {most}.")
    best = min(instead, key=lambda override: instead[override].peak.total, default=None)
    if best is not None and instead[best].peak.total < peak.total:
        text.append("\n").append(best, "bold").append(" would lower it most.")
    elif best is not None:
        text.append("\nNone of the choices below would lower it.")
    return text


def beside(plan: Plan) -> list[str]:
    """Say what other tiers hold at the most, and what of it could not be as asked."""
    found = beside_text(plan.steps[plan.highest].elsewhere)
    if plan.staging:
        found.append(
            f"Beside the device, a checkpoint's copies take {format_bytes(plan.staging)} of host memory (workspace)."
        )
    return [*found, *plan.notes]


def place(plan: Plan) -> str:
    """Name the moment of the peak."""
    where = {"step": "the update of the weights", BETWEEN: "between two phases"}.get(plan.peak.phase, plan.peak.phase)
    return f"{where} of {'the first' if plan.highest == 'first' else 'every'} step"


def instead_table(plan: Plan, instead: Instead) -> Table:
    """List other choices by their peak, lowest first."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("instead", no_wrap=True)
    table.add_column("peak", justify="right", no_wrap=True)
    table.add_column("", justify="right", no_wrap=True)
    for override, other in sorted(instead.items(), key=lambda choice: choice[1].peak.total):
        change = f"{100 * (other.peak.total / plan.peak.total - 1):+.0f}%"
        style = "green" if change.startswith("-") else "yellow"
        same = change in ("+0%", "-0%")
        table.add_row(override, format_bytes(other.peak.total), Text("the same") if same else Text(change, style))
    return table


def remark(cfg: Config, plan: Plan) -> str:
    """Say what was counted, for which device, and what comes on top."""
    where = f"Counted on fake {plan.device.upper()} tensors: every tensor of the step, to the byte."
    if plan.device == "cuda" or cfg.run.device is Device.cpu:
        kernels = ""
    elif cfg.run.device is Device.cuda:
        kernels = " This torch has no CUDA here, so the kernels of attention and autocast are the CPU's."
    else:
        kernels = " On a GPU, kernels of attention and autocast may save other tensors."
    return f"{where}{kernels} {on_top(plan)}"


def on_top(plan: Plan) -> str:
    """Say what a count of tensors leaves out."""
    exchanged = ", buffers of NCCL" if plan.ranks > 1 else ""
    return (
        f"Not included: the process and its libraries, scratch memory inside kernels, and on a GPU rounding and gaps "
        f"of the allocator, the CUDA context{exchanged} (as a rule of thumb 1-2 GiB and 5-10%)."
    )


def plan_json(cfg: Config, plan: Plan, instead: Instead, untried: Sequence[str]) -> dict[str, Any]:
    """Return the report as data: bytes."""
    about = info(cfg, plan)
    return {
        "model": about.model,
        "parameters": plan.parameters,
        "optimizer": about.optimizer,
        "precision": {"weights": cfg.precision.weights.value, "compute": cfg.precision.compute.value},
        "ranks": plan.ranks,
        "micro_steps": cfg.train.global_batch // plan.ranks // cfg.train.micro_batch,
        "micro_batch": cfg.train.micro_batch,
        "sequence_length": cfg.data.sequence_length,
        "counted_on": plan.device,
        "not_included": on_top(plan),
        "peak": peak_json(plan),
        "predicted": plan.to_json(),
        "host": host_workspace(plan.staging),
        "notes": list(plan.notes),
        "instead": {override: peak_json(other) for override, other in instead.items()},
        "not_tried": list(untried),
    }


def host_workspace(staging: int) -> dict[str, int]:
    """Bytes of host memory beside the device, by what takes them."""
    return {"checkpoint": staging} if staging else {}


def peak_json(plan: Plan) -> dict[str, Any]:
    peak: Peak = plan.peak
    return {"total": peak.total, "step": plan.highest, "phase": peak.phase, "by_kind": peak.by_kind}


def plural(count: int, what: str) -> str:
    return f"{count} {what}" + ("" if count == 1 else "s")
