"""torch's models of transformers with a soft prompt: `get_peft_model` and `PeftModel.from_pretrained` for a prompt.

The state dict has PEFT's names: `base_model.` before the names of the model, and `prompt_encoder.default.` before those
of the prompt; for LLaMA-Adapter, `base_model.model.` and the prompts in the attention modules.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from peftarray.backends.torch_layers import AdaptedLayer, SavedModule
from peftarray.backends.torch_prompt_attention import PromptedAttention
from peftarray.backends.torch_prompt_inputs import (
    Inputs,
    alone,
    is_behind,
    scored_at_the_end,
    text_size,
    with_keys,
    with_labels,
    with_rows,
)
from torch import nn
from torch.nn import functional

from peftarray.errors import ConfigError, MatchError, ShapeError, UnsupportedError, nearest
from peftarray.formats.prompts import load_prompt, save_prompt, source_prompt
from peftarray.prompts import AdaptionPromptConfig, CPTConfig, Host, PrefixTuningConfig, Prompt, VirtualTokens
from peftarray.prompts.adaption_prompt import GATE, PROMPT
from peftarray.prompts.prompt import EMBEDDINGS, TOKENS, without_tasks
from peftarray.sites import saved_modules, with_heads
from peftarray.summary import trainable_summary

__all__ = ["PromptModule", "adapt_module", "load_module"]

_ROWS = "embedding.weight"
"""What PEFT's encoders call the rows that files call `prompt_embeddings`."""


def adapt_module(
    module: nn.Module,
    config: Prompt,
    *,
    seed: int = 0,
    adapter_name: str = "default",
    token_ids: Sequence[int] | None = None,
) -> PromptModule:
    """A model with a new prompt; `peftarray.get_peft_model` says the rest."""
    config = config.for_model(_host(module))
    embedding: Any = _embedding(module).weight.detach()
    file = config.source_file()
    source = source_prompt(file) if file else None
    arrays = config.init_params(embedding, seed=seed, embedding=embedding, token_ids=token_ids, source=source)
    modules, saved = dict(module.named_modules()), []
    if isinstance(config, VirtualTokens):
        config = with_heads(config, modules)
        saved = saved_modules(modules, config)
    return PromptModule(module, config, arrays, saved, adapter_name, trainable=True)


def load_module(
    module: nn.Module, folder: str | Path, *, adapter_name: str = "default", is_trainable: bool = False
) -> PromptModule:
    """A model with the prompt in a folder; `peftarray.PeftModel.from_pretrained` says the rest."""
    found = load_prompt(folder, host=_host(module), like=_embedding(module).weight.detach())
    if is_trainable:
        found.config.check_trainable(found.params)
    here = module.state_dict()
    for name, array in found.replace.items():
        if name not in here or here[name].shape != array.shape:
            shape = tuple(here[name].shape) if name in here else "nothing"
            message = f"{name} is {shape} in the model, and {tuple(array.shape)} in {folder}{nearest(name, here)}"
            raise MatchError(message)
    saved = []
    if isinstance(found.config, VirtualTokens):
        saved = saved_modules(dict(module.named_modules()), found.config, strict=False)
    model = PromptModule(module, found.config, found.params, saved, adapter_name, trainable=is_trainable)
    with torch.no_grad():
        for name, parameter in model.saved().items():
            if name in found.replace:
                parameter.copy_(found.replace[name])
    return model


class PromptModule(nn.Module):
    """A model of transformers with a soft prompt: it is used like the model, and trained like any other module.

    What it says of each token (`logits`, `last_hidden_state`) it says of those of the text. Each call takes `task_ids`
    `(batch,)` where the prompt has several tasks, and for CPT `input_type_mask` `(batch, length)`.

    Attributes:
        base_model: the model; for LLaMA-Adapter it holds the model as `model`.
        prompt_encoder: name of the prompt -> its arrays; not for LLaMA-Adapter, whose lie in the attention modules.
        peft_config: name of the prompt -> its configuration, with the model's sizes.
        active_adapter: its name.
    """

    def __init__(
        self,
        module: nn.Module,
        config: Prompt,
        arrays: Mapping[str, torch.Tensor],
        saved: Collection[str],
        adapter_name: str,
        *,
        trainable: bool,
    ) -> None:
        super().__init__()
        _check(module, config, adapter_name)
        self.training = module.training
        self.peft_config = {adapter_name: config}
        self.active_adapter = adapter_name
        self._saved = tuple(saved)
        self._takes = inspect.signature(module.forward)
        for parameter in module.parameters():
            parameter.requires_grad_(False)
        if isinstance(config, AdaptionPromptConfig):
            for name in config.modules:
                prompt, gate = arrays[f"{name}.{PROMPT}"], arrays[f"{name}.{GATE}"]
                attention = PromptedAttention(module.get_submodule(name), prompt, gate, trainable=trainable)
                module.set_submodule(name, attention)
            self.base_model: nn.Module = _Held(module)
        else:
            self.base_model = module
            self.prompt_encoder = nn.ModuleDict({adapter_name: _Encoder(config, arrays, trainable=trainable)})
        for name in saved:
            whole = SavedModule(module.get_submodule(name))
            whole.modules_to_save[adapter_name] = copy.deepcopy(whole.original_module).requires_grad_(trainable)
            whole.active = adapter_name
            module.set_submodule(name, whole)
        # What a training loop looks for in the arguments of `forward` is in those of the model's.
        self.forward = _signed(type(self).forward, self._takes, self)  # type: ignore[method-assign]

    # Use.

    def forward(
        self,
        *arguments: Any,
        task_ids: torch.Tensor | None = None,
        input_type_mask: torch.Tensor | None = None,
        **options: Any,
    ) -> Any:
        """What the model makes of texts behind the prompt."""
        module = self.get_base_model()
        given = self._named(arguments, options)
        config = self._config
        if isinstance(config, AdaptionPromptConfig):
            without_tasks(config, task_ids)
            return module(**given)
        as_tuple = given.get("return_dict", getattr(self.config, "return_dict", True)) is False
        given["return_dict"] = True
        side = self._side
        length = self._length(given, side)
        labels = given.pop("labels", None) if isinstance(config, CPTConfig) else None
        with scored_at_the_end(module, given) if self._stands_in_rows else nullcontext():
            output = module(**self._behind_prompt(given, task_ids))
        if labels is not None:
            assert isinstance(config, CPTConfig)
            loss = config.weighted_loss(output.logits, *config.labelled(labels, input_type_mask))
            output = type(output)(**{"loss": loss, **output})
        if self._rows_of(side):
            output = alone(output, length)
        return output.to_tuple() if as_tuple else output

    def generate(self, *arguments: Any, task_ids: torch.Tensor | None = None, **options: Any) -> Any:
        """What the model writes after texts, behind the prompt; arguments as the model's `generate` takes them."""
        module: Any = self.get_base_model()
        if isinstance(self._config, AdaptionPromptConfig):
            return module.generate(*arguments, **options)
        if arguments and options.get("inputs") is None:
            options["inputs"], *others = arguments
            arguments = tuple(others)
        if self._encodes and self._stands_in_rows:
            # The encoder runs before the model is called.
            if options.get("input_ids") is None and options.get("inputs") is not None:
                options["input_ids"] = options.pop("inputs")
            rows, _ = self._sides(task_ids)
            options = with_rows(options, rows, _embedding(module))

        def behind(_: nn.Module, __: Any, given: Inputs) -> tuple[tuple[()], Inputs]:
            if given.get("use_cache") is False:
                given = {**given, "past_key_values": None}  # that of the call before, which read the whole text too
            return (), self._behind_prompt(given, task_ids)

        handle = module.register_forward_pre_hook(behind, with_kwargs=True)
        try:
            return module.generate(*arguments, **options)
        finally:
            handle.remove()

    def get_base_model(self) -> nn.Module:
        """The model."""
        return self.base_model.model if isinstance(self.base_model, _Held) else self.base_model

    # Training.

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """How many numbers training changes, and how many there are."""
        sizes = [(parameter.numel(), parameter.requires_grad) for parameter in self.parameters()]
        return sum(size for size, trained in sizes if trained), sum(size for size, _ in sizes)

    def print_trainable_parameters(self) -> None:
        """Print how many numbers training changes, as PEFT words it."""
        print(trainable_summary(*self.get_nb_trainable_parameters()))

    def freeze(self) -> PromptModule:
        """Let training change nothing."""
        return self._set_trained(False)

    def unfreeze(self) -> PromptModule:
        """Let training change the prompt again.

        Raises:
            UnsupportedError: the file that it came from lacks what made it.
        """
        self._config.check_trainable(self._arrays())
        return self._set_trained(True)

    # Ends.

    def merge_and_unload(self, safe_merge: bool = False) -> nn.Module:
        """Refused.

        Raises:
            UnsupportedError: always.
        """
        message = f"{self._config.peft_type} cannot be merged: a soft prompt changes the input and not the weights"
        raise UnsupportedError(message)

    def unload(self) -> nn.Module:
        """The model as it was."""
        module = self.get_base_model()
        for name, part in list(module.named_modules()):
            if isinstance(part, PromptedAttention):
                module.set_submodule(name, part.model)
        for name in self._saved:
            whole = module.get_submodule(name)
            assert isinstance(whole, SavedModule)
            module.set_submodule(name, whole.original_module)
        return module

    def save_pretrained(self, save_directory: str | Path, **_: Any) -> None:
        """Write the prompt as PEFT does: `adapter_config.json` and `adapter_model.safetensors`.

        A prompt that is not called `"default"` goes to a folder of its name within the directory.
        """
        name = self.active_adapter
        folder = Path(save_directory) if name == "default" else Path(save_directory) / name
        arrays = {key: array.detach() for key, array in self._arrays().items()}
        with torch.no_grad():
            save_prompt(folder, self._config, arrays, replace={k: p.detach() for k, p in self.saved().items()})

    def saved(self) -> dict[str, nn.Parameter]:
        """Name in the model -> parameter of what is trained whole beside the prompt."""
        module, found = self.get_base_model(), {}
        for name in self._saved:
            whole: Any = module.get_submodule(name)
            found |= {f"{name}.{key}": parameter for key, parameter in whole.current.named_parameters()}
        return found

    def __getattr__(self, name: str) -> Any:
        """What this module has, or else what the model has."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":
                raise
            return getattr(self.get_base_model(), name)

    # What the above stand on.

    @property
    def _config(self) -> Prompt:
        return self.peft_config[self.active_adapter]

    @property
    def _encodes(self) -> bool:
        return bool(getattr(self.config, "is_encoder_decoder", False))

    @property
    def _side(self) -> str:
        """Before the names of the arguments that what the model says of tokens is about."""
        return "decoder_" if self._encodes else ""

    @property
    def _stands_in_rows(self) -> bool:
        return not isinstance(self._config, PrefixTuningConfig)

    def _rows_of(self, side: str) -> bool:
        """Whether rows of the prompt stand before the tokens of this side."""
        return self._stands_in_rows and (not side or self._decodes_behind_rows)

    @property
    def _labels_texts(self) -> bool:
        """Whether a label is that of a text and not of a token."""
        return self._config.task_type == "SEQ_CLS" or "SequenceClassification" in type(self.get_base_model()).__name__

    @property
    def _decodes_behind_rows(self) -> bool:
        # PEFT's other rows for a decoder are read by nothing.
        config = self._config
        several = isinstance(config, VirtualTokens) and config.submodules == 2
        return self._encodes and several and config.peft_type == "MULTITASK_PROMPT_TUNING"

    def _named(self, arguments: tuple[Any, ...], options: Mapping[str, Any]) -> Inputs:
        return dict(zip(self._takes.parameters, arguments, strict=False)) | dict(options)

    def _arrays(self) -> dict[str, torch.Tensor]:
        config = self._config
        if isinstance(config, AdaptionPromptConfig):
            found: dict[str, torch.Tensor] = {}
            for name in config.modules:
                attention: Any = self.get_base_model().get_submodule(name)
                found |= attention.arrays(name)
            return found
        encoder: Any = self.prompt_encoder[self.active_adapter]
        return encoder.arrays()

    def _sides(self, task_ids: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """The rows that stand before a text, and those before a decoder's, which may be none."""
        drop = _drop if self.training else None
        rows = self._config.weights(self._arrays(), task_ids=task_ids, drop=drop)[TOKENS]
        count = _count(self._config)
        return rows[..., :count, :], rows[..., count:, :]

    def _behind_prompt(self, given: Inputs, task_ids: torch.Tensor | None) -> Inputs:
        """The arguments with the prompt before the texts."""
        config, module, side = self._config, self.get_base_model(), self._side
        if isinstance(config, PrefixTuningConfig):
            without_tasks(config, task_ids)
            if module.training and any(getattr(part, "gradient_checkpointing", False) for part in module.modules()):
                message = "gradient checkpointing keeps no keys and values, so a prefix has no effect there; disable it"
                raise UnsupportedError(message)
            dtype = _embedding(module).weight.dtype
            pairs = [(k.to(dtype), v.to(dtype)) for k, v in config.key_values(self._arrays())]
            given = self._with_decoder(given) if side else given
            return with_keys(given, pairs, side)
        first, second = self._sides(task_ids)
        if side and self._decodes_behind_rows:
            given = with_labels(with_rows(self._with_decoder(given), second, _embedding(module), side), _count(config))
        if side:
            return given if given.get("encoder_outputs") is not None else with_rows(given, first, _embedding(module))
        if not is_behind(given):
            given = with_labels(given, _count(config), of_texts=self._labels_texts)
        return with_rows(given, first, _embedding(module))

    def _with_decoder(self, given: Inputs) -> Inputs:
        """The arguments with the decoder's text, which follows from labels where it is not given."""
        if all(given.get(name) is None for name in ("decoder_input_ids", "decoder_inputs_embeds")):
            if given.get("labels") is None:
                message = "neither decoder_input_ids nor labels are given; the decoder reads one of them"
                raise ConfigError(message)
            module: Any = self.get_base_model()
            return {**given, "decoder_input_ids": module.prepare_decoder_input_ids_from_labels(labels=given["labels"])}
        return given

    def _length(self, given: Inputs, side: str) -> int:
        """How long the texts are that the model says something of."""
        known = any(given.get(f"{side}{name}") is not None for name in ("input_ids", "inputs_embeds"))
        return text_size(given, side)[1] if known or not side else text_size(self._with_decoder(given), side)[1]

    def _set_trained(self, trainable: bool) -> PromptModule:
        frozen = {name for name, row in self._config.params().items() if row.frozen}
        for name, array in self._arrays().items():
            array.requires_grad_(trainable and name not in frozen)
        for parameter in self.saved().values():
            parameter.requires_grad_(trainable)
        return self


class _Held(nn.Module):
    """Holds the model under the name that it has in PEFT's state dict."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *arguments: Any, **options: Any) -> Any:
        return self.model(*arguments, **options)


class _Encoder(nn.Module):
    """The arrays of a prompt, under the names that PEFT's encoders give them."""

    def __init__(self, config: Prompt, arrays: Mapping[str, torch.Tensor], *, trainable: bool) -> None:
        super().__init__()
        table = config.params()
        self._paths = {name: _ROWS if name == EMBEDDINGS else name for name in arrays}
        for name, array in arrays.items():
            holder, _, last = self._paths[name].rpartition(".")
            is_trained = trainable and name in table and not table[name].frozen
            self._within(holder).register_parameter(last, nn.Parameter(array, requires_grad=is_trained))

    def arrays(self) -> dict[str, torch.Tensor]:
        """The arrays by the names of the prompt's table."""
        found = {}
        for name, path in self._paths.items():
            holder, _, last = path.rpartition(".")
            found[name] = getattr(self.get_submodule(holder), last)
        return found

    def _within(self, path: str) -> nn.Module:
        inner: nn.Module = self
        for name in filter(None, path.split(".")):
            if name not in dict(inner.named_children()):
                inner.add_module(name, nn.Module())
            inner = inner.get_submodule(name)
        return inner


def _check(module: nn.Module, config: Prompt, adapter_name: str) -> None:
    """Refuse what cannot have the prompt, before anything of it is changed.

    Raises:
        ConfigError: the name is none, or the model has an adapter or a prompt.
        ShapeError, UnsupportedError: the model cannot read the prompt.
    """
    if "." in adapter_name or not adapter_name:
        message = f"adapter_name is {adapter_name!r}; it must be a name without dots"
        raise ConfigError(message)
    if any(isinstance(part, (PromptModule, PromptedAttention, AdaptedLayer, SavedModule)) for part in module.modules()):
        message = "the model has an adapter or a prompt already; unload or merge it first"
        raise ConfigError(message)
    decodes = bool(getattr(module.config, "is_encoder_decoder", False))
    if isinstance(config, AdaptionPromptConfig):
        for name in config.modules:
            PromptedAttention.check(module.get_submodule(name))
        return
    if isinstance(config, VirtualTokens) and config.submodules == 2 and not decodes:
        message = (
            f"{config.peft_type} with 2 submodules (task_type {config.task_type}) is for an encoder with a decoder, and "
            f"{type(module).__name__} is none"
        )
        raise UnsupportedError(message)
    width = _embedding(module).weight.shape[1]
    if isinstance(config, PrefixTuningConfig):
        _check_prefix(module, config)
    elif isinstance(config, VirtualTokens) and config.token_dim != width:
        message = f"{type(config).__name__}.token_dim is {config.token_dim}; the rows of this model's words are {width} wide"
        raise ShapeError(message)


def _check_prefix(module: Any, config: PrefixTuningConfig) -> None:
    """Refuse a model that reads no keys and values from before, or other ones."""
    inner = getattr(module, getattr(module, "base_model_prefix", ""), module)
    for part in (module, inner):
        names = inspect.signature(part.forward).parameters
        passes = part is not inner and any(row.kind is row.VAR_KEYWORD for row in names.values())
        if "past_key_values" not in names and not passes:
            message = f"{type(part).__name__} takes no past_key_values, so a prefix has no effect on it"
            raise UnsupportedError(message)
    width = getattr(module.config, "d_kv", None)
    if width is not None and width * config.size("num_attention_heads") != config.token_dim:
        message = (
            f"PrefixTuningConfig.token_dim is {config.token_dim} for {config.num_attention_heads} heads; those of this "
            f"model are {width} wide each: set token_dim to {width * config.size('num_attention_heads')}"
        )
        raise ShapeError(message)


def _host(module: Any) -> Host:
    config = getattr(module, "config", None)
    if not callable(getattr(config, "to_dict", None)):
        message = (
            f"a soft prompt goes before what a model of transformers reads, and {type(module).__name__} is none; give "
            "your own module what config.weights(params) makes"
        )
        raise ConfigError(message)
    return Host.read(module.config.to_dict(), [name for name, _ in module.named_parameters()])


def _embedding(module: Any) -> Any:
    """The layer that makes the rows of words."""
    found = module.get_input_embeddings()
    if found.weight.is_meta:
        message = "the model is on the meta device; load its weights first"
        raise UnsupportedError(message)
    return found


def _count(config: Prompt) -> int:
    assert isinstance(config, VirtualTokens)
    return config.size("num_virtual_tokens")


def _drop(x: torch.Tensor, share: float) -> torch.Tensor:
    return functional.dropout(x, share, training=True)


def _signed(function: Any, signature: inspect.Signature, owner: Any) -> MethodType:
    def forward(self: Any, *arguments: Any, **options: Any) -> Any:
        return function(self, *arguments, **options)

    own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    rows = list(signature.parameters.values())
    place = next((i for i, row in enumerate(rows) if row.kind is row.VAR_KEYWORD), len(rows))
    added = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None)
        for name in ("task_ids", "input_type_mask")
        if name not in signature.parameters
    ]
    forward.__signature__ = signature.replace(parameters=[own, *rows[:place], *added, *rows[place:]])  # type: ignore[attr-defined]
    return MethodType(forward, owner)

