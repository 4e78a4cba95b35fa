"""`quantize_checkpoint`: a checkpoint's linear weights quantised, streaming, as a merge without adapters."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from peftarray.dtypes import storage_dtype
from peftarray.errors import ConfigError, MatchError, PeftError, UnsupportedError, nearest
from peftarray.formats.models import input_embedding_names, is_conv1d, output_embedding_names, types_inside
from peftarray.merging.base import Base, default_code, read_base
from peftarray.merging.encoded import Encoded, planned_tensors
from peftarray.merging.execute import Progress, planned_memory
from peftarray.merging.inputs import PathLike, parse_size
from peftarray.merging.origin import StoredOrigin
from peftarray.merging.plan import Form, Item, Output, Plan, packed_plan
from peftarray.merging.quantisation_report import QuantisationReport, QuantisedTensor
from peftarray.merging.report import TensorReport
from peftarray.merging.side_files import write_side_files
from peftarray.merging.writing import check_place, worker_count, write_plan
from peftarray.quant import Codec, codec
from peftarray.quant.layouts import StoredWeight, WritableLayout, layout_for
from peftarray.stores.checkpoint import Checkpoint
from peftarray.stores.safetensors import TensorInfo

__all__ = ["quantize_checkpoint"]

_ROUTERS = ("gate", "router", "shared_expert_gate")
_HEADS = ("lm_head", "embed_out", "classifier", "score", "qa_outputs")


def quantize_checkpoint(
    base: PathLike,
    out: PathLike,
    name: str = "nf4",
    *,
    skip: Sequence[str] = (),
    max_shard_size: int | str | None = None,
    threads: int | None = None,
    dry_run: bool = False,
    planned: Callable[[int], None] | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> QuantisationReport:
    """Quantise the linear weights of a checkpoint, and write it with what `config.json` must say of them.

    Embeddings, heads, routers, norms, biases and stacked experts stay as they are. One weight a thread is held in
    float32 at a time, whatever the size of the model: the scales of scales of `nf4` need the mean over a whole weight.
    A run that was killed goes on where it stopped.

    Args:
        base: a folder with `config.json` and safetensors weights, or one `.safetensors` file.
        out: the folder to write; it must not exist.
        name: the codec's name.
        skip: modules that stay as they are, by their names or the ends of these.
        max_shard_size: split the result anew, in files of at most so many bytes; None keeps the base's files.
        threads: how many work at once; None for one a core.
        dry_run: plan and check, and write nothing.
        planned: called once with the bytes that there are to write.
        progress: called with (bytes done, name) as the work goes on.
        **settings: the codec's.

    Returns:
        What was done, with the error of every weight.

    Raises:
        PeftError: of the kind that fits; nothing stands at `out` then.
    """
    started = time.perf_counter()
    target, workers = Path(out).absolute(), worker_count(threads)
    form = Form(max_shard_size=parse_size(max_shard_size) if max_shard_size is not None else None)
    chosen = codec(name, **settings)
    layout = layout_for(chosen)
    source = read_base(Checkpoint.open(Path(base)))
    if source.quantised:
        message = f"{base} is quantised already; quantise the checkpoint that it was made from"
        raise ConfigError(message)
    finished = check_place(target, [source.files.path], dry_run=dry_run)
    weights = _linear(source.files, skip)
    plan = _plan(source, weights, chosen, layout, form)
    before = {info.name: info.nbytes for info in source.files.values()}

    def report(tensors: Iterable[TensorReport], resumed: int) -> QuantisationReport:
        errors = {tensor.name: tensor.sums.base_relative_error for tensor in tensors}
        return QuantisationReport(
            out=str(target),
            codec=str(chosen),
            layout=layout.kind,
            tensors=tuple(
                QuantisedTensor(one.name, one.weight.shape, before[one.name], one.nbytes, errors.get(one.name))
                for one in plan.encoded
            ),
            copied=len(plan.outputs),
            nbytes_before=sum(before.values()),
            nbytes=plan.nbytes,
            memory=planned_memory(plan, workers),
            seconds=time.perf_counter() - started,
            resumed=resumed,
            dry_run=dry_run,
        )

    if dry_run:
        return report((), 0)
    if planned is not None:
        planned(plan.nbytes)

    def finish(tensors: tuple[TensorReport, ...], folder: Path, resumed: int) -> QuantisationReport:
        write_side_files(plan, folder)
        return report(tensors, resumed)

    return write_plan(plan, target, finish, threads=workers, progress=progress, adopt=finished)


def _linear(files: Checkpoint, skip: Sequence[str]) -> list[str]:
    """The weights to quantise.

    Raises:
        MatchError: nothing is skipped by a name.
        UnsupportedError: there is no linear weight, or the model stores them the other way round.
    """
    kind = files.config.get("model_type")
    model = kind if isinstance(kind, str) else None
    inner = types_inside(files.config)
    heads = (*_HEADS, *output_embedding_names(model))
    embeddings = tuple(input_embedding_names(model))
    found, unused = [], dict.fromkeys(skip)
    for name, info in files.items():
        module, _, local = name.rpartition(".")
        passed = [word for word in skip if f".{module}".endswith(f".{word}") or f"{module}.".startswith(f"{word}.")]
        for word in passed:
            unused.pop(word, None)
        known = storage_dtype(info.code)
        matrix = local == "weight" and len(info.shape) == 2 and known is not None and known.floating and known.bits > 8
        last = module.rpartition(".")[2]
        if passed or not matrix or last in _ROUTERS or last in heads or "embed" in module:
            continue
        if any(f".{module}".endswith(f".{ending}") for ending in (*embeddings, *heads)):
            continue
        if is_conv1d(model, module, inner):
            message = (
                f"{name} is stored as (in, out), as {model} has it, and no layout of quantised weights holds that; "
                "such a checkpoint cannot be quantised here"
            )
            raise UnsupportedError(message)
        found.append(name)
    if unused:
        word = next(iter(unused))
        modules = [name.rpartition(".")[0] for name in files]
        message = f"skip names {word}, and {files.path} has no module of that name{nearest(word, modules)}"
        raise MatchError(message)
    if not found:
        message = f"{files.path} has no linear weight to quantise"
        raise UnsupportedError(message)
    return found


def _plan(base: Base, weights: Sequence[str], chosen: Codec, layout: WritableLayout, form: Form) -> Plan:
    files = base.files
    modules = [name.removesuffix(".weight") for name, info in files.items() if len(info.shape) > 1]
    chosen_names = set(weights)
    skipped = [module for module in modules if f"{module}.weight" not in chosen_names]
    if not any(module.endswith("lm_head") for module in modules):
        skipped.append("lm_head")  # which is tied, and is no weight of its own
    stated = layout.config(chosen, skipped=skipped, dtype=default_code(files))
    groups = []
    for file, shard in files.shards.items():
        items = []
        for name, info in shard.tensors.items():
            origin = StoredOrigin(shard, info)
            if name in chosen_names:
                items.append(_encoded(origin, chosen, layout, stated))
            else:
                items.append(_copy(origin))
        groups.append((file, items))
    config = files.config | {layout.stated_in: stated}
    facts = {"codec": repr(chosen), "layout": layout.kind, "weights": list(weights)}
    return packed_plan(base, (), groups, form, config=config, facts=facts)


def _copy(origin: StoredOrigin) -> Item:
    columns = origin.shape[-1] if origin.shape else 1
    return Item((origin.info,), lambda places: Output(places[0], origin, columns))


def _encoded(origin: StoredOrigin, chosen: Codec, layout: WritableLayout, stated: dict[str, Any]) -> Item:
    info = origin.info
    weight = StoredWeight(info.name, info.shape, chosen, {}, dtype=info.code)
    try:
        tensors = planned_tensors(layout, weight, stated, info.code)
    except PeftError as error:
        message = f"{info.name}: {error} (--skip {info.name.removesuffix('.weight')} leaves it as it is)"
        raise type(error)(message) from None

    def placed(places: tuple[TensorInfo, ...]) -> Encoded:
        return Encoded(weight, layout, stated, info.code, origin, info.shape[-1], (), places)

    return Item(tensors, placed)
