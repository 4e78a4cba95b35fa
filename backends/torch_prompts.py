"""torch's models of transformers with a soft prompt: `get_peft_model` and `PeftModel.from_pretrained` for a prompt.

The state dict has PEFT's names: `base_model.` before the names of the model, and `prompt_encoder.default.` before those
of the prompt; for LLaMA-Adapter, `base_model.model.` and the prompts in the attention modules.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peftarray.backends.torch_prompt_attention import PromptedAttention
from peftarray.backends.torch_prompt_checks import check_prompt, embedding_of, host_of
from peftarray.backends.torch_prompt_encoder import PromptArrays
from peftarray.backends.torch_prompt_inputs import Inputs
from peftarray.backends.torch_prompt_reading import Reading
from peftarray.backends.torch_saved import SavedModule
from peftarray.backends.torch_switch import Acting, Switch
from peftarray.backends.torch_whole import WholeModel
from torch import nn
from torch.nn import functional

from peftarray.errors import ConfigError, MatchError, UnsupportedError, nearest
from peftarray.formats.prompts import load_prompt, save_prompt, source_prompt
from peftarray.model.sites import saved_modules, with_heads
from peftarray.prompts import (
    AdaptionPromptConfig,
    CPTConfig,
    MultitaskPromptTuningConfig,
    PrefixTuningConfig,
    Prompt,
    TokenPrompt,
    VirtualTokens,
)
from peftarray.prompts.adaption_prompt import GATE, PROMPT
from peftarray.prompts.prompt import without_tasks

__all__ = ["PromptModule", "adapt_module", "load_module"]


def adapt_module(
    module: nn.Module,
    config: Prompt,
    *,
    seed: int = 0,
    adapter_name: str = "default",
    token_ids: Sequence[int] | None = None,
) -> PromptModule:
    """A model with a new prompt; `peftarray.get_peft_model` says the rest."""
    config = config.for_model(host_of(module))
    embedding: Any = embedding_of(module).weight.detach()
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
    found = load_prompt(folder, host=host_of(module), like=embedding_of(module).weight.detach())
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


class PromptModule(WholeModel):
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
        check_prompt(module, config, adapter_name)
        self.training = module.training
        self.peft_config = {adapter_name: config}
        self.active_adapter = adapter_name
        self._saved = tuple(saved)
        self._switch = Switch()
        self._switch.now = Acting(active=(adapter_name,))
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
            self.prompt_encoder = nn.ModuleDict({adapter_name: PromptArrays(config, arrays, trainable=trainable)})
        for name in saved:
            whole = SavedModule(module.get_submodule(name), self._switch)
            whole.modules_to_save[adapter_name] = copy.deepcopy(whole.original_module).requires_grad_(trainable)
            module.set_submodule(name, whole)
        self._show_inputs(_with_own_inputs(self._takes, config))

    # Use.

    def forward(
        self,
        *arguments: Any,
        labels: torch.Tensor | None = None,
        task_ids: torch.Tensor | None = None,
        input_type_mask: torch.Tensor | None = None,
        **options: Any,
    ) -> Any:
        """What the model makes of texts behind the prompt."""
        module, config = self.get_base_model(), self._config
        # Training loops look for labels among the arguments of the class.
        given: Inputs = dict(zip(self._takes.parameters, arguments, strict=False)) | options
        given |= {} if labels is None else {"labels": labels}
        if input_type_mask is not None and not isinstance(config, CPTConfig):
            message = f"input_type_mask is for the loss of CPT, and the prompt is {config.peft_type}; leave it out"
            raise ConfigError(message)
        if isinstance(config, AdaptionPromptConfig):
            without_tasks(config, task_ids)
            return module(**given)
        reading = self._reading(task_ids)
        as_tuple = given.get("return_dict", getattr(self.config, "return_dict", True)) is False
        given["return_dict"] = True
        words = given.pop("labels", None) if isinstance(config, CPTConfig) else None
        with reading.scoring(given):
            output = module(**reading.inputs(given))
        if words is not None and isinstance(config, CPTConfig):
            loss = config.weighted_loss(output.logits, *config.labelled(words, input_type_mask))
            output = type(output)(**{"loss": loss, **output})
        output = reading.of_text(output, reading.length(given))
        return output.to_tuple() if as_tuple else output

    def generate(self, *arguments: Any, task_ids: torch.Tensor | None = None, **options: Any) -> Any:
        """What the model writes after texts, behind the prompt; arguments as the model's `generate` takes them."""
        module: Any = self.get_base_model()
        if isinstance(self._config, AdaptionPromptConfig):
            without_tasks(self._config, task_ids)
            return module.generate(*arguments, **options)
        reading = self._reading(task_ids)
        if arguments:
            options["inputs"], *others = arguments
            arguments = (None, *others)
        inputs = reading.encoder_inputs(options)
        if arguments:
            arguments = (inputs.pop("inputs", None), *arguments[1:])

        def behind(_: nn.Module, __: Any, given: Inputs) -> tuple[tuple[()], Inputs]:
            if given.get("use_cache") is False:
                given = {**given, "past_key_values": None}  # that of the call before, which read the whole text too
            return (), reading.inputs(given)

        handle = module.register_forward_pre_hook(behind, with_kwargs=True)
        try:
            return module.generate(*arguments, **inputs)
        finally:
            handle.remove()

    def get_base_model(self) -> nn.Module:
        """The model."""
        return self.base_model.model if isinstance(self.base_model, _Held) else self.base_model

    # Training.

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
        module = self.get_base_model()
        found: dict[str, nn.Parameter] = {}
        for name in self._saved:
            whole: Any = module.get_submodule(name)
            found |= {f"{name}.{key}": parameter for key, parameter in whole.behind.named_parameters()}
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

    def _reading(self, task_ids: torch.Tensor | None) -> Reading:
        config = self._config
        assert isinstance(config, (PrefixTuningConfig, TokenPrompt))
        drop = functional.dropout if self.training else None
        return Reading(self.get_base_model(), config, self._arrays(), task_ids, drop)

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


def _with_own_inputs(signature: inspect.Signature, config: Prompt) -> inspect.Signature:
    """A model's arguments, and those that a prompt takes beside them."""
    rows = list(signature.parameters.values())
    place = next((i for i, row in enumerate(rows) if row.kind is row.VAR_KEYWORD), len(rows))
    kinds = {"task_ids": MultitaskPromptTuningConfig, "input_type_mask": CPTConfig}
    added = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None)
        for name, kind in kinds.items()
        if isinstance(config, kind)
    ]
    return signature.replace(parameters=[*rows[:place], *added, *rows[place:]])
