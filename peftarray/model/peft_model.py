"""A model with adapters: the model's weights in a mapping, some of them adapted.

The weights are a pure function of the adapters' arrays, so that any library differentiates a loss of the form
`loss(model.with_params(params).weights, batch)`, and `peftarray.training.fit` trains the model. What changes is the
registry of its adapters, a value that each verb replaces in one assignment: a verb that fails changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from peftarray import trees
from peftarray.adapter import Adapter
from peftarray.arrays import Array, Params
from peftarray.errors import ConfigError, MatchError, UnsupportedError, nearest
from peftarray.formats.prompts import holds_prompt
from peftarray.layers import Layer
from peftarray.method import AdapterConfig
from peftarray.model.acting import Acting, Make
from peftarray.model.bases import backend_of_module, weights_of
from peftarray.model.kept_stacks import KeptStacks
from peftarray.model.prompted import PromptModel, check_words
from peftarray.model.registry import BASE_NAME, AdapterSet, PromptSet
from peftarray.model.registry_status import status_of
from peftarray.model.saving import adapter_folder, save_adapter
from peftarray.model.slotted import AdapterSlots, slots_of
from peftarray.model.status import Status
from peftarray.model.summary import trainable_summary
from peftarray.model.verbs import AdapterVerbs, Merged, Names
from peftarray.model.weights import (
    check_finite,
    effective,
    in_precision,
    mixed,
    stand_ins,
    under,
    with_dropout,
    with_weights,
)
from peftarray.prompts import Prompt

__all__ = ["PeftModel", "get_peft_model", "trainable_summary"]


def get_peft_model(
    model: Any,
    config: AdapterConfig | Prompt,
    *,
    seed: int = 0,
    adapter_name: str = "default",
    layers: Mapping[str, Layer] | None = None,
    token_ids: Sequence[int] | None = None,
) -> Any:
    """A model with a new adapter on the weights that `config` targets.

    Args:
        model: a mapping of names to arrays, or nested ones (as JAX and Flax have them), with any function that uses
            them; an object with such `weights`, as those of `peftarray.models`; or a `torch.nn.Module`.
        config: the method, with `target_modules`; or a soft prompt, for a model of `peftarray.models` or transformers.
        seed: the same seed gives the same adapter on every library.
        adapter_name: what the adapter is called.
        layers: module's name -> its layer, for what a mapping does not say; see `peftarray.model.sites.find_sites`.
        token_ids: the words that a soft prompt starts from, as the model's tokenizer numbers them.

    Returns:
        A `PeftModel`, or a `PromptModel`; for a torch module, a module that is used like it, with PEFT's names.

    Raises:
        PeftError: of the kind that fits; see `peftarray.errors`.

    Example:
        >>> import numpy as np
        >>> from peftarray import LoraConfig
        >>> weights = {"up.weight": np.ones((8, 4), np.float32), "down.weight": np.ones((4, 8), np.float32)}
        >>> model = get_peft_model(weights, LoraConfig(r=2, target_modules=["up"]))
        >>> model.print_trainable_parameters()
        trainable params: 24 || all params: 88 || trainable%: 27.2727
        >>> (np.ones((1, 4), np.float32) @ model.weights["up.weight"].T).shape
        (1, 8)
    """
    check_words(config, token_ids)
    if weights_of(model) is None:
        named = {"seed": seed, "adapter_name": adapter_name, "token_ids": token_ids}
        return backend_of_module(model).adapt_module(model, config, **named)
    if isinstance(config, Prompt):
        return PromptModel.create(model, config, seed=seed, token_ids=token_ids)
    made = PeftModel(model, layers=layers or {})
    made.add_adapter(adapter_name, config, seed=seed)
    return made


@dataclass(eq=False)
class PeftModel(AdapterVerbs):
    """Weights in a mapping, with adapters. The weights that were given never change.

    Attributes:
        task_ids: the task of each text, for a prompt that has several; see `for_tasks`.
        kept_stacks: of adapters that batches had together.
    """

    task_ids: Any = None
    kept_stacks: KeptStacks = field(default_factory=KeptStacks, repr=False)

    # What there is.

    @property
    def adapters(self) -> Mapping[str, Adapter]:
        """Module's name -> the adapter on it, of the first active one that is a method."""
        return next((one.found.adapters for one in self._acting() if isinstance(one.found, AdapterSet)), {})

    def status(self, *, norms: bool = True) -> Status:
        """What adapters there are, layer by layer; with the norm of each update unless `norms` is false."""
        merged = self.merged_state.names if self.merged_state else ()
        return status_of(self.registry, dict(trees.named(weights_of(self.base))), merged=merged, norms=norms)

    # The weights.

    @property
    def weights(self) -> Any:
        """The weights in the form of the base's, made now of the present arrays: take them once a step.

        Adapted ones are `AdaptedWeight`s. Dropout is off.
        """
        return under(self._model, self._acting(), stand_ins, task_ids=self.task_ids)

    def training_weights(self, key: Any, *, adapter_names: Sequence[str | None] | None = None) -> Any:
        """The same with the methods' dropout, drawn by a step's key (`peftarray.draws.step_key`).

        Args:
            key: of the step.
            adapter_names: as for `weights_for`.
        """
        if adapter_names is not None:
            return self._mixed(adapter_names, with_dropout(key, by_name=True), key)
        acting = self._acting()
        make = with_dropout(key, by_name=len(acting) > 1)
        return under(self._model, acting, make, task_ids=self.task_ids, key=key)

    def weights_for(self, adapter_names: Sequence[str | None]) -> Any:
        """The weights of a batch whose samples have adapters of their own, active or not.

        What goes through an adapted weight are samples `(n, ..., in)`, or their rows `(n * m, in)` with those of one
        sample together.

        Args:
            adapter_names: the adapter of each of the `n` samples; None or `"__base__"` for none.

        Raises:
            MatchError: there is none of a name.
        """
        return self._mixed(adapter_names, stand_ins, kept=self.kept_stacks)

    def effective_weights(self) -> Any:
        """The weights in the form of the base's, every one an array: for code that an `AdaptedWeight` cannot serve."""
        return effective(self._model, self._acting(), task_ids=self.task_ids)

    def slots(self, names: Sequence[str] | None = None, *, max_rank: int, count: int | None = None) -> AdapterSlots:
        """Low-rank adapters in stacks of one shape, for functions that are compiled once.

        Args:
            names: of the adapters; all if None.
            max_rank: at least the highest rank among them, and among those that are to take their places.
            count: how many slots; as many as adapters if None.
        """
        wanted = list(self.registry.entries) if names is None else list(names)
        self.registry = self.registry.ready(wanted, self._shelf)
        sets = {one.name: one.found for one in self._acting(wanted)}
        scales = {one.name: one.scale for one in self._acting(wanted)}
        return slots_of(self.base, sets, max_rank=max_rank, count=count, scales=scales)

    def for_tasks(self, task_ids: Any) -> PeftModel:
        """The same model for texts of these tasks, `(batch,)`, for a prompt that has several."""
        return replace(self, task_ids=task_ids)

    def __call__(self, *arguments: Any, adapter_names: Sequence[str | None] | None = None, **options: Any) -> Any:
        """The base model, where it is one, on these weights; arguments as for it.

        Args:
            *arguments: of the model.
            adapter_names: the adapter of each sample, as for `weights_for`; the active ones for all if None.
            **options: of the model.
        """
        if not callable(self.base):
            message = "this PeftModel has weights and no model; call your function with model.weights"
            raise ConfigError(message)
        return self.base(self._chosen(adapter_names), *arguments, **options)

    def generate(self, *arguments: Any, adapter_names: Sequence[str | None] | None = None, **options: Any) -> Any:
        """What the model writes after texts; see `peftarray.models.generate`, and `adapter_names` above."""
        return self.base.generate(self._chosen(adapter_names), *arguments, **options)

    # Training.

    @property
    def params(self) -> dict[str, Array]:
        """Name -> array of what training changes, of all active adapters. They may be set, all or some.

        `<module>.<array>`, the tensor's name of what is trained whole, and by its own name what layers share. Of
        several active adapters, a name ends in the adapter's, but for what is trained whole.
        """
        found: dict[str, Array] = {}
        for one in (trained := self._trained()):
            found |= {self._public(one.name, key): array for key, array in one.found.trained().items()}
        return found | {name: array for one in trained for name, array in one.found.whole.items()}

    @params.setter
    def params(self, params: Params) -> None:
        self.registry = self.with_params(params).registry

    def with_params(self, params: Params) -> PeftModel:
        """The same model with these in place of arrays of the same names among `params`.

        Raises:
            MatchError: a name is not among them.
        """
        known = self.params
        for name in params:
            if name not in known:
                message = f"{name} is not trained by this model{nearest(name, known)}"
                raise MatchError(message)
        registry = self.registry
        for one in self._trained():
            public = {key: self._public(one.name, key) for key in one.found.trained()}
            own = {key: params[name] for key, name in public.items() if name in params}
            whole = {name: params.get(name, array) for name, array in one.found.whole.items()}
            registry = registry.changed(one.name, replace(one.found.with_trained(own), whole=whole))
        return replace(self, registry=registry)

    def in_precision(self, dtype: str) -> PeftModel:
        """The same model on a base whose floating-point arrays are in a dtype, such as `"bfloat16"`."""
        return replace(self, base=in_precision(self.base, dtype))

    def freeze(self) -> PeftModel:
        """The same model, of which training changes nothing."""
        return self._trainable(False)

    def unfreeze(self) -> PeftModel:
        """The same model, whose active adapters training changes.

        Raises:
            UnsupportedError: a prompt came from a file that lacks what made it.
        """
        return self._trainable(True)

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """How many numbers training changes, and how many there are, in memory."""
        total = sum(math.prod(array.shape) for array in trees.leaves(weights_of(self.base)) if hasattr(array, "shape"))
        found = [entry.found for entry in self.registry.entries.values() if entry.found is not None]
        total += sum(math.prod(array.shape) for one in found for array in one.arrays())
        return sum(math.prod(array.shape) for array in self.params.values()), total

    def print_trainable_parameters(self) -> None:
        """Print how many numbers training changes, as PEFT words it."""
        print(trainable_summary(*self.get_nb_trainable_parameters()))

    # Ends.

    def merge_adapter(self, adapter_names: Names | None = None, safe_merge: bool = False) -> None:
        """Let the weights be those that adapters are merged into, until `unmerge_adapter`; the base is kept.

        Args:
            adapter_names: one or several; the active ones if None.
            safe_merge: raise where a merged weight is not finite.

        Raises:
            NumberError: as `safe_merge` asks.
            UnsupportedError: one of them is a prompt.
        """
        self._refuse_merged("merge_adapter")
        names, merged = self._merged(adapter_names, safe_merge)
        self.merged_state = Merged(names, merged)

    def unmerge_adapter(self) -> None:
        """Let the adapters act beside the base again, which is bit for bit as it was."""
        self.merged_state = None

    @contextmanager
    def merged(self, *adapter_names: str, safe_merge: bool = False) -> Iterator[PeftModel]:
        """Within it the weights are merged; arguments as for `merge_adapter`."""
        self.merge_adapter(adapter_names or None, safe_merge)
        try:
            yield self
        finally:
            self.unmerge_adapter()

    def merge_and_unload(self, safe_merge: bool = False, adapter_names: Names | None = None) -> Any:
        """The base with adapters merged into it, in its own form; arguments as for `merge_adapter`."""
        self._refuse_merged("merge_and_unload")
        return self._merged(adapter_names, safe_merge)[1]

    def unload(self) -> Any:
        """The base, as it was given."""
        return self.base

    def save_pretrained(self, folder: str | Path, selected_adapters: Sequence[str] | None = None) -> None:
        """Write adapters as PEFT does: `adapter_config.json` and `adapter_model.safetensors`.

        Args:
            folder: of the adapter called `"default"`; others go to folders of their names within it.
            selected_adapters: names; all if None.

        Raises:
            MatchError: there is none of a name.
            OutputError: the folder cannot be written.
        """
        names = list(self.registry.entries) if selected_adapters is None else list(selected_adapters)
        every = {name: self.registry.entry(name) for name in names}
        for name in every:
            save_adapter(adapter_folder(folder, name), self.registry.ready([name], self._shelf).found(name))

    @classmethod
    def from_pretrained(
        cls,
        model: Any,
        folder: str | Path,
        *,
        adapter_name: str = "default",
        is_trainable: bool = False,
        layers: Mapping[str, Layer] | None = None,
    ) -> Any:
        """A model with the adapter that PEFT or `save_pretrained` wrote; `load_adapter` adds others.

        Args:
            model: as for `get_peft_model`.
            folder: with `adapter_config.json` and `adapter_model.safetensors`.
            adapter_name: what the adapter is called here.
            is_trainable: whether training changes it.
            layers: as for `get_peft_model`.

        Raises:
            PeftError: of the kind that fits; see `peftarray.errors`.
        """
        if weights_of(model) is None:
            return backend_of_module(model).load_module(
                model, folder, adapter_name=adapter_name, is_trainable=is_trainable
            )
        if holds_prompt(folder):
            return PromptModel.from_pretrained(model, folder, is_trainable=is_trainable)
        made = cls(model, layers=layers or {})
        made.load_adapter(folder, adapter_name, is_trainable)
        return made

    # What the above stand on.

    @property
    def _model(self) -> Any:
        """The base, or what adapters are merged into now."""
        return self.merged_state.base if self.merged_state is not None and self.registry.enabled else self.base

    def _acting(self, names: Sequence[str] | None = None) -> list[Acting]:
        """The adapters that act, or those of these names, which memory holds; without methods where some are merged."""
        found = []
        for name in self.registry.acting if names is None else names:
            one = Acting(name, self.registry.found(name), self.registry.entry(name).scale)
            if names is not None or self.merged_state is None or isinstance(one.found, PromptSet):
                found.append(one)
        return found

    def _trained(self) -> list[Acting]:
        return [one for one in self._acting() if one.found.trainable]

    def _public(self, name: str, key: str) -> str:
        """The name in `params` of an array of an adapter."""
        return key if len(self.registry.active) == 1 else f"{key}.{name}"

    def _trainable(self, trainable: bool) -> PeftModel:
        registry = self.registry
        for one in self._acting():
            found = one.found.unfrozen() if trainable else replace(one.found, trainable=False)
            # No folder: what was trained in place is in no file.
            entry = replace(registry.entry(one.name), found=found, trainable=trainable, folder=None)
            registry = registry.replaced(one.name, entry)
        return replace(self, registry=registry)

    def _chosen(self, adapter_names: Sequence[str | None] | None) -> Any:
        return self.weights if adapter_names is None else self.weights_for(adapter_names)

    def _mixed(self, adapter_names: Sequence[str | None], make: Make, key: Any = None, **options: Any) -> Any:
        self._refuse_merged("adapter_names")
        names = [None if name == BASE_NAME else name for name in adapter_names]
        used = list(dict.fromkeys(name for name in names if name is not None))
        if not names:
            message = "adapter_names is empty; give a name, or None, for each sample of the batch"
            raise ConfigError(message)
        self.registry = self.registry.ready(used, self._shelf)
        in_order = [name for name in self.registry.entries if name in set(used)]
        acting = {one.name: one for one in self._acting(in_order)}
        return mixed(self.base, acting, names, make, task_ids=self.task_ids, key=key, **options)

    def _merged(self, adapter_names: Names | None, safe: bool) -> tuple[tuple[str, ...], Any]:
        given = self.registry.active if adapter_names is None else adapter_names
        names = (given,) if isinstance(given, str) else tuple(given)
        registry = self.registry.activated(names, self._shelf) if adapter_names is not None else self.registry
        acting = replace(self, registry=replace(registry, enabled=True))._acting()
        for one in acting:
            if isinstance(one.found, PromptSet):
                kind = one.found.config.peft_type
                message = f"{one.name} ({kind}) cannot be merged: a soft prompt changes the input and not the weights"
                raise UnsupportedError(message)
        merged = effective(self.base, acting)
        if safe:
            check_finite(merged)
        return names, with_weights(self.base, merged)
