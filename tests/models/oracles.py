"""Tiny random models of transformers, drawn and saved: what the reference models must agree with."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from hypothesis import strategies as st

VOCABULARY = 37
LONGEST = 24


def rotary(pairs: int) -> st.SearchStrategy[dict[str, Any]]:
    """Every way of stretching rotary positions that keeps its frequencies, for heads of so many pairs of channels."""
    theta = st.sampled_from([100.0, 10000.0])
    factor = st.floats(1.5, 8.0)
    before = st.integers(LONGEST, 4 * LONGEST)
    some = {"rope_theta": theta, "factor": factor}
    old = some | {"original_max_position_embeddings": before}
    llama3 = {"low_freq_factor": st.floats(0.5, 1.5), "high_freq_factor": st.floats(2.0, 6.0)}
    yarn = {
        "beta_fast": st.floats(8.0, 40.0),
        "beta_slow": st.floats(0.5, 2.0),
        "truncate": st.booleans(),
        "attention_factor": st.floats(0.5, 2.0),
        "mscale": st.floats(0.5, 1.5),
        "mscale_all_dim": st.floats(0.5, 1.5),
    }
    factors = st.lists(st.floats(1.0, 3.0), min_size=pairs, max_size=pairs)
    kinds = {
        "default": st.fixed_dictionaries({"rope_theta": theta}),
        "linear": st.fixed_dictionaries(some),
        "dynamic": st.fixed_dictionaries(some),
        "llama3": st.fixed_dictionaries(old | llama3),
        "yarn": st.fixed_dictionaries(old, optional=yarn),
        "longrope": st.fixed_dictionaries(old | {"short_factor": factors, "long_factor": factors}),
    }
    return st.sampled_from(sorted(kinds)).flatmap(
        lambda kind: kinds[kind].map(lambda found: found | {"rope_type": kind})
    )


@st.composite
def llamas(draw: Any) -> tuple[str, dict[str, Any]]:
    """A language model of the Llama family with settings of its own."""
    kind = draw(st.sampled_from(["Llama", "Mistral", "Qwen2", "Qwen3", "SmolLM3"]))
    groups, share, pairs = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(2, 4))
    heads, layers = groups * share, draw(st.integers(1, 3))
    settings: dict[str, Any] = {
        "hidden_size": heads * 2 * pairs,
        "intermediate_size": draw(st.integers(1, 20)),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "tie_word_embeddings": draw(st.booleans()),
        "rms_norm_eps": draw(st.sampled_from([1e-6, 1e-2])),
        "rope_parameters": draw(rotary(pairs)),
    }
    if kind in ("Llama", "SmolLM3"):
        settings |= {"attention_bias": draw(st.booleans()), "mlp_bias": draw(st.booleans())}
    if kind in ("Llama", "Mistral", "Qwen3") and draw(st.booleans()):
        pairs = draw(st.integers(2, 4))
        settings |= {"head_dim": 2 * pairs, "rope_parameters": draw(rotary(pairs))}
    elif kind == "Qwen3":
        settings["head_dim"] = 2 * pairs
    if kind == "Mistral":
        settings["sliding_window"] = draw(st.none() | st.integers(1, 8))
    if kind in ("Qwen2", "Qwen3"):
        settings |= {"use_sliding_window": draw(st.booleans()), "sliding_window": draw(st.integers(1, 8))}
        settings["max_window_layers"] = draw(st.integers(0, layers))
        if settings["use_sliding_window"] and draw(st.booleans()):
            words = st.sampled_from(["full_attention", "sliding_attention"])
            settings["layer_types"] = draw(st.lists(words, min_size=layers, max_size=layers))
    if kind == "SmolLM3":
        settings["no_rope_layer_interval"] = draw(st.integers(1, 3))
    return f"{kind}ForCausalLM", settings


@st.composite
def gpt2s(draw: Any) -> tuple[str, dict[str, Any]]:
    """A GPT-2 with settings of its own."""
    heads = draw(st.integers(1, 3))
    return "GPT2LMHeadModel", {
        "n_embd": heads * draw(st.integers(1, 6)),
        "n_head": heads,
        "n_layer": draw(st.integers(1, 3)),
        "n_inner": draw(st.none() | st.integers(1, 20)),
        "activation_function": draw(st.sampled_from(["gelu_new", "gelu", "relu", "silu", "tanh"])),
        "layer_norm_epsilon": draw(st.sampled_from([1e-5, 1e-2])),
        "scale_attn_weights": draw(st.booleans()),
        "scale_attn_by_inverse_layer_idx": draw(st.booleans()),
        "tie_word_embeddings": draw(st.booleans()),
    }


@st.composite
def berts(draw: Any) -> tuple[str, dict[str, Any]]:
    """A BERT with a classifier and settings of its own."""
    heads = draw(st.integers(1, 3))
    return "BertForSequenceClassification", {
        "hidden_size": heads * draw(st.integers(1, 6)),
        "num_attention_heads": heads,
        "num_hidden_layers": draw(st.integers(1, 3)),
        "intermediate_size": draw(st.integers(1, 20)),
        "hidden_act": draw(st.sampled_from(["gelu", "gelu_new", "relu", "silu"])),
        "type_vocab_size": draw(st.integers(1, 3)),
        "num_labels": draw(st.integers(1, 4)),
    }


@dataclass(frozen=True)
class Batch:
    """Texts of several lengths in one array, with padding on one side."""

    ids: np.ndarray
    mask: np.ndarray | None


@st.composite
def batches(draw: Any, longest: int = 12, sides: tuple[str, ...] = ("left", "right")) -> Batch:
    """Random tokens: one or several texts, with padding or without."""
    lengths = draw(st.lists(st.integers(1, longest), min_size=1, max_size=3))
    width = max(lengths)
    ids = np.asarray(draw(st.lists(st.integers(0, VOCABULARY - 1), min_size=width, max_size=width)))
    ids = (ids + 5 * np.arange(len(lengths))[:, None]) % VOCABULARY
    if draw(st.booleans()):
        return Batch(ids, None)
    places = np.arange(width)
    kept = places < np.asarray(lengths)[:, None]
    mask = kept[:, ::-1] if draw(st.sampled_from(sides)) == "left" else kept
    return Batch(ids, np.ascontiguousarray(mask).astype(np.int64))


def built(name: str, settings: dict[str, Any], *, seed: int = 0) -> Any:
    """A model of a class of transformers; its numbers are large enough for every part to be seen in the result."""
    model_class = getattr(transformers, name)
    names = {"n_positions"} if name.startswith("GPT2") else {"max_position_embeddings"}
    usual = dict.fromkeys(names, LONGEST) | {"vocab_size": VOCABULARY, "pad_token_id": 0, "eos_token_id": 1}
    config = model_class.config_class(**(usual | settings))
    torch.manual_seed(seed)
    model = model_class(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter)) if parameter.ndim < 2 else parameter.normal_(0, 0.3)
    return model.eval()


@contextmanager
def saved(model: Any, **options: Any) -> Iterator[Path]:
    """The folder that a model was saved to."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, **options)
        yield Path(folder)


def answer(model: Any, ids: np.ndarray, mask: np.ndarray | None, **more: np.ndarray) -> Any:
    """What a model of transformers gives for a batch."""
    given = {name: torch.asarray(value) for name, value in more.items()}
    with torch.no_grad():
        attention_mask = None if mask is None else torch.asarray(mask)
        return model(input_ids=torch.asarray(ids), attention_mask=attention_mask, **given)


def assert_close(found: np.ndarray, wanted: Any, share: float, where: np.ndarray | None = None) -> None:
    """Equal up to a share of the largest number; at padding, anything goes."""
    reference = np.asarray(wanted)
    assert found.shape == reference.shape
    assert found.dtype == reference.dtype
    if where is not None:
        found, reference = found[where.astype(bool)], reference[where.astype(bool)]
    assert np.abs(found - reference).max() <= share * np.abs(reference).max()
