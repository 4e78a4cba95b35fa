"""What the terminal shows of a report, a combination, a verification or an inspection."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from peftarray.combining import CombineReport
    from peftarray.inspection import Inspection
    from peftarray.merging import MergeReport, Verification
    from peftarray.merging.quantisation_report import QuantisationReport

__all__ = ["combination_text", "inspection_text", "quantisation_text", "report_text", "verification_text"]

_WORST = 5


def report_text(report: MergeReport, *, every_tensor: bool = False) -> str:
    """A merge's report, as lines."""
    lines = []
    changed = len(report.tensors)
    if report.dry_run:
        lines.append(
            f"would apply {report.applied} of {report.given} adapter tensors "
            f"and copy {report.copied} base tensors unchanged"
        )
        lines.append(
            f"would write {_size(report.nbytes)} to {report.out}, "
            f"holding at most {_size(report.memory)} of weights at once"
        )
    else:
        lines.append(
            f"applied {report.applied} of {report.given} adapter tensors to {changed} base tensors; "
            f"{report.copied} copied unchanged"
        )
    lines += [f"note: {note}" for note in report.notes]
    if report.unmatched:
        lines.append(
            f"passed over, as allowed: {len(report.unmatched)} tensors or targets, the first is {report.unmatched[0]}"
        )
    if not report.dry_run:
        lines += _figures(report)
        if every_tensor:
            lines += ["", *_table(report)]
        rate = report.nbytes / report.seconds / 1e9 if report.seconds else 0.0
        again = f", {report.resumed} shards from an earlier run" if report.resumed else ""
        lines.append(f"wrote {_size(report.nbytes)} to {report.out} in {report.seconds:.2f} s ({rate:.2f} GB/s{again})")
    return "\n".join(lines)


def combination_text(report: CombineReport) -> str:
    """A combination's report, as lines."""
    terms = " + ".join(f"{weight:g} x {folder}" for folder, weight in report.adapters)
    lines = [f"{report.recipe.combination}: {terms}"]
    lines.append(f"  {'modules':>7} {'rank':>9} {'norm':>9} {'energy':>8} {'error':>9} {'worst':>9}  kind")
    for kind in report.kinds:
        ranks = str(kind.most_rank)
        if kind.least_rank != kind.most_rank:
            ranks = f"{kind.least_rank}..{ranks}"
        lines.append(
            f"  {kind.modules:7d} {ranks:>9} {kind.norm:9.3g} {100 * kind.energy:7.2f}% {kind.error:9.2g} "
            f"{kind.worst:9.2g}  {kind.name}"
        )
    lines += [f"note: {note}" for note in report.notes]
    lines.append(
        f"kept {100 * report.energy:.2f}% of the energy in all (error {report.error:.3g}); wrote {report.parameters:,} "
        f"numbers, r={report.rank}, to {report.out}"
    )
    return "\n".join(lines)


def quantisation_text(report: QuantisationReport, *, every_tensor: bool = False) -> str:
    """What quantising a checkpoint did, as lines."""
    count = len(report.tensors)
    if report.dry_run:
        return (
            f"would quantise {count} weights with {report.codec} ({report.layout}) and copy {report.copied} tensors\n"
            f"would write {_size(report.nbytes)}, {_size(report.nbytes_before)} before, to {report.out}, holding at "
            f"most {_size(report.memory)} of weights at once"
        )
    lines = [f"quantised {count} weights with {report.codec} ({report.layout}); {report.copied} copied unchanged"]
    if every_tensor:
        lines.append(f"{'error':>9} {'bits':>6}  tensor")
        lines += [f"{tensor.error or 0:9.3g} {tensor.bits:6.2f}  {tensor.name}" for tensor in report.tensors]
    if report.worst is not None:
        lines.append(f"  largest error          {report.worst.error:.3g} of its norm, of {report.worst.name}")
    again = f" ({report.resumed} shards from an earlier run)" if report.resumed else ""
    lines.append(
        f"wrote {_size(report.nbytes)}, {_size(report.nbytes_before)} before, to {report.out} in "
        f"{report.seconds:.2f} s{again}"
    )
    return "\n".join(lines)


def _figures(report: MergeReport) -> list[str]:
    total = report.total
    dtypes = ", ".join(sorted({tensor.dtype for tensor in report.tensors}))
    lines = [
        f"  size of the update     {total.relative_update:.4g} of the base's",
        f"  held by {dtypes or 'the output':<14} {100 * report.retained:.2f}% of its energy "
        f"(error {total.error:.3g}, cosine {total.cosine:.4f})",
        f"  entries unchanged      {100 * total.unchanged_share:.1f}%",
    ]
    if total.nonfinite:
        lines.append(f"  NaN or infinite        {total.nonfinite} entries, as in the base")
    if report.empty:
        lines.append(
            f"  update is zero         in {len(report.empty)} of {len(report.tensors)} tensors: "
            "the adapter changes nothing there"
        )
    if report.mismatched:
        worst = report.mismatched[0]
        lines.append(
            f"  OTHER BASE             in {len(report.mismatched)} of {len(report.tensors)} tensors the original is "
            f"farther from the quantised base than the update is large, {worst.mismatch:.3g} times in {worst.name}; an "
            "adapter that was trained on the quantised base may want --base-as dequantised"
        )
    if report.flagged:
        floats = all("float" in tensor.dtype for tensor in report.flagged)
        remedy = "--dtype float32" if floats else "--keep-touched-in bfloat16, in place of --requantise,"
        lines.append(
            f"  LOST IN ROUNDING       {len(report.flagged)} tensors hold less than 90% of their update; "
            f"{remedy} keeps it:"
        )
        for tensor in report.flagged[:_WORST]:
            lines.append(
                f"    {100 * tensor.retained:5.1f}% held, {100 * tensor.unchanged:5.1f}% of the entries unchanged: "
                f"{tensor.name}"
            )
    return lines


def _table(report: MergeReport) -> list[str]:
    bases = any(t.base_error is not None for t in report.tensors)
    more = f" {'base':>9}" if bases else ""
    head = f"{'update':>9} {'error':>9} {'held':>7} {'cosine':>7} {'same':>6}{more}  tensor"
    rows = []
    for t in report.tensors:
        base = f" {t.base_error or 0:9.3g}" if bases else ""
        figures = f"{t.update:9.3g} {t.error:9.3g} {100 * t.retained:6.2f}% {t.cosine:7.4f} {100 * t.unchanged:5.1f}%"
        rows.append(f"{figures}{base}  {t.name}")
    return [head, *rows, ""]


def verification_text(found: Verification) -> str:
    """A verification, as lines."""
    lines = [
        f"looked at {found.tensors} tensors; {found.copied} must equal their source byte for byte",
        f"recomputed {found.entries} entries in float64: "
        f"{100 * found.exact_share:.4f}% are the correctly rounded result",
        f"the largest deviation is {found.worst:.3g} of what is allowed",
    ]
    lines += [f"FAILED: {failure}" for failure in found.failures[:_WORST]]
    if len(found.failures) > _WORST:
        lines.append(f"and {len(found.failures) - _WORST} more failures")
    if found.passed:
        lines.append("passed")
    return "\n".join(lines)


def inspection_text(found: Inspection) -> str:
    """An inspection, as lines."""
    dtypes = ", ".join(f"{count} {name}" for name, count in found.dtypes.items())
    lines = [
        f"{found.kind}: {found.tensors} tensors ({dtypes}), {found.parameters:,} parameters, {_size(found.nbytes)}"
    ]
    lines += [f"  {name}: {_short(value)}" for name, value in found.facts.items()]
    factored = [module for module in found.modules if module.rank is not None]
    if factored:
        lines.append(f"  {'rank':>4} {'scale':>7} {'norm':>9} {'largest':>9} {'used':>5}  module")
        for module in factored:
            largest = module.spectrum[0] if module.spectrum else 0.0
            lines.append(
                f"  {module.rank:4d} {module.scale:7.3g} {module.norm:9.3g} {largest:9.3g} "
                f"{module.effective_rank:5.1f}  {module.name}"
            )
    others = [module for module in found.modules if module.rank is None]
    if others:
        lines.append(f"  {'scale':>7}  module: arrays")
        lines += [f"  {module.scale:7.3g}  {module.name}: {_arrays(module.shapes)}" for module in others]
    if found.shared:
        lines.append(f"  shared by all: {_arrays(found.shared)}")
    lines += [f"  whole tensor: {name}" for name in found.replaced]
    if found.kind == "checkpoint":
        lines += [f"  {'x'.join(map(str, shape)):>16}  {name}" for name, shape in found.largest.items()]
    return "\n".join(lines)


def _arrays(shapes: dict[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in shapes.items())


def _size(nbytes: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if nbytes >= size:
            return f"{nbytes / size:.3g} {unit}"
    return f"{nbytes} bytes"


def _short(value: object) -> str:
    words = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
    return words if len(words) <= 100 else words[:97] + "..."
