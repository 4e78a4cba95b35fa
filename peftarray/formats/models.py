"""Names of a model's tensors in memory ("live") and in its checkpoint files ("disk"), by architecture, as data.

A PEFT adapter names the modules of the class it was trained on. A checkpoint often keeps other names, those of the
first release of its architecture, which transformers translates on loading and restores on saving; and since
transformers 5 the experts of most mixtures are one stacked tensor in memory, where the file holds a tensor an expert.
From names and shapes alone, this module says which disk tensor holds which live tensor, or which part of it.

Rules read `disk > live`, over whole components of a dotted name: `#` is a number, `^` ties a rule to the start of the
name, nothing after `>` removes the components. Each applies at most once to a name, in order. No rule changes a live
name of its own architecture, so files that hold live names pass through. Architectures without a rule, and those whose
file fuses what the model splits, keep the names of the file. Checked against the architectures of transformers 5.23.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from peftarray.errors import MatchError

__all__ = [
    "BASE_PREFIXES",
    "Place",
    "input_embedding_names",
    "is_conv1d",
    "live_places",
    "output_embedding_names",
    "parameter_order",
    "stored_transposed",
    "types_inside",
]


@dataclass(frozen=True)
class Place:
    """Where a live tensor, or a part of one, lies on disk.

    Attributes:
        disk: Name of the tensor on disk.
        expert: Index along the first axis of a stacked live tensor; None unless the disk tensor is one expert's.
        part: `(i, n)`: the disk tensor is the i-th of n equal parts of the live tensor's output axis.
        flipped: The disk tensor is the live one with its last two axes exchanged.
    """

    disk: str
    expert: int | None = None
    part: tuple[int, int] = (0, 1)
    flipped: bool = False


_Rule = tuple[str, re.Pattern[str], str]

_ATTENTION = """
    attention.attention.query > attention.q_proj; attention.attention.key > attention.k_proj
    attention.attention.value > attention.v_proj; attention.output.dense > attention.o_proj
"""
_VIT = "encoder.layer.# > layers.#;" + _ATTENTION + "intermediate.dense > mlp.fc1; output.dense > mlp.fc2"
_SELF_ATTENTION = """
    attention.self.query > attention.q_proj; attention.self.key > attention.k_proj
    attention.self.value > attention.v_proj; attention.output.dense > attention.o_proj
"""
_DETR = """
    backbone.conv_encoder > backbone; out_proj > o_proj
    layers.#.fc1 > layers.#.mlp.fc1; layers.#.fc2 > layers.#.mlp.fc2
"""
_LANGUAGE_MODEL = """
    ^language_model.lm_head > lm_head; ^language_model.model > model.language_model
    ^language_model > model.language_model; ^multi_modal_projector > model.multi_modal_projector
"""
_TEXT = """
    ^model.embed_tokens > model.language_model.embed_tokens; ^model.layers > model.language_model.layers
    ^model.norm > model.language_model.norm; ^language_model > model.language_model; ^visual > model.visual
"""

# A key lists the types that share its rules; a type under several keys has the rules of all.
_RENAMES: dict[str, str] = {
    "gpt_neox": "^embed_out > lm_head",
    "vit audio-spectrogram-transformer beit deit ijepa vit_mae vit_msn vivit": _VIT,
    "beit": """
        encoder.relative_position_bias > shared_position_bias
        layers.#.attention.attention.relative_position_bias > layers.#.relative_position_bias
    """,
    "dinov2 dinov2_with_registers depth_anything prompt_depth_anything": _ATTENTION + "mlp.weights_out > mlp.down_proj",
    "dinov3_vit": "^layer.# > model.layer.#",
    "dinov3_convnext": "^stages > model.stages",
    "swin": _SELF_ATTENTION
    + """
        attention.self.relative_position_bias_table > attention.relative_position_bias.relative_position_bias_table
        intermediate.dense > mlp.fc1; output.dense > mlp.fc2
    """,
    "segformer": _SELF_ATTENTION
    + """
        encoder.patch_embeddings.# > stages.#.patch_embeddings; encoder.block.# > stages.#.blocks
        encoder.layer_norm.# > stages.#.layer_norm; decode_head.linear_c > decode_head.linear_projections
        attention.self.sr > attention.sequence_reduction.sequence_reduction
        attention.self.layer_norm > attention.sequence_reduction.layer_norm
        mlp.dense1 > mlp.fc1; mlp.dense2 > mlp.fc2
        layer_norm_1 > layernorm_before; layer_norm_2 > layernorm_after
    """,
    "detr deformable_detr maskformer rt_detr rt_detr_v2 pp_doclayout_v2 pp_doclayout_v3": _DETR,
    "rt_detr rt_detr_v2 pp_doclayout_v2 pp_doclayout_v3": "encoder.encoder.#.layers > encoder.aifi.#.layers",
    "clip_vision_model siglip_vision_model siglip2_vision_model chinese_clip_vision_model": "^vision_model >",
    "clip_text_model siglip_text_model siglip2_text_model": "^text_model >",
    "altclip": "encoder.layer.# > encoder.layers.#",
    "llava llava_next llava_next_video llava_onevision video_llava vipllava gemma3 paligemma aya_vision internvl "
    "mistral3 got_ocr2 pp_chart2table aria fuyu qwen2_audio voxtral voxtral_realtime audioflamingo3 musicflamingo "
    "glmasr": _LANGUAGE_MODEL
    + """
        ^vision_tower > model.vision_tower; ^image_tower > model.image_tower; ^video_tower > model.video_tower
        ^audio_tower > model.audio_tower; ^image_newline > model.image_newline
        ^vision_embed_tokens > model.vision_embed_tokens
        image_tower.vision_model > image_tower; video_tower.vision_model > video_tower
    """,
    "llava llava_next llava_next_video llava_onevision vipllava gemma3 paligemma aya_vision mistral3 aria "
    "cohere2_vision lfm2_vl colpali": "vision_tower.vision_model > vision_tower",
    "mllama": _LANGUAGE_MODEL + "^vision_model > model.vision_model",
    "granite_speech granite_speech_plus": _LANGUAGE_MODEL + "^encoder > model.encoder; ^projector > model.projector",
    "colpali": "vlm.language_model.model > vlm.language_model",
    "qwen2_5_omni_thinker qwen3_omni_moe_thinker": "^thinker >; ^audio_tower > model.audio_tower",
    "qwen2_vl qwen2_5_vl qwen2_5_omni_thinker qwen3_omni_moe_thinker paddleocr_vl": _TEXT,
    "paddleocr_vl": "^mlp_AR > model.projector",
    "qwen2_5_omni qwen3_omni_moe": """
        thinker.audio_tower > thinker.model.audio_tower; thinker.visual > thinker.model.visual
        thinker.model.embed_tokens > thinker.model.language_model.embed_tokens
        thinker.model.layers > thinker.model.language_model.layers
        thinker.model.norm > thinker.model.language_model.norm
    """,
    "gemma3n_text qwen3_5_text qwen3_5_moe_text": "^model.language_model > model",
    "mixtral minimax minimax_m2 phimoe": "block_sparse_moe > mlp",
    "phimoe": "mlp.gate > mlp.router",
    "granitemoe granitemoeshared granitemoehybrid": """
        block_sparse_moe.input_linear.weight > block_sparse_moe.experts.gate_up_proj
        block_sparse_moe.output_linear.weight > block_sparse_moe.experts.down_proj
        block_sparse_moe.router.layer.weight > block_sparse_moe.router.weight
    """,
    "aria aria_text": """
        mlp.experts.fc1.weight > mlp.experts.gate_up_proj; mlp.experts.fc2.weight > mlp.experts.down_proj
    """,
    "nemotron_h": "^backbone > model",
    "ernie4_5_moe": "mlp.moe_statics > mlp.gate.moe_statics",
    "exaone_moe": "mlp.e_score_correction_bias > mlp.gate.e_score_correction_bias",
    "laguna": """
        mlp.experts.e_score_correction_bias > mlp.gate.e_score_correction_bias; mlp.shared_expert > mlp.shared_experts
    """,
    "mimo_v2_flash": "self_attn.attention_sink_bias > self_attn.sinks",
}
# Where a type is made of models of any other types, the rules of those apply below this prefix.
_INNER_RULES = dict.fromkeys("llava llava_next llava_onevision vipllava mistral3 internvl".split(), "model.") | {
    "vision-encoder-decoder": "encoder.",
    "vision-text-dual-encoder": "vision_model.",
    "depth_pro": "",
}
# What any file may hold from older releases, whatever its architecture.
_LEGACY = """
    LayerNorm.gamma > LayerNorm.weight; LayerNorm.beta > LayerNorm.bias
    weight_g > parametrizations.weight.original0; weight_v > parametrizations.weight.original1
    ^model.language_model.model > model.language_model
"""
# Types whose live experts are stacked and whose files hold a tensor an expert.
_STACKED = frozenset(
    """
    afmoe axk1 axk2 beam cohere2_moe deepseek_v2 deepseek_v3 deepseek_v32 dots1 ernie4_5_moe exaone_moe flex_olmo flint
    glm4_moe glm4_moe_lite glm4v_moe glm_moe_dsa hunyuan_v1_moe jamba laguna lfm2_moe longcat_flash mellum mimo_v2_flash
    minimax minimax_m2 mixtral nemotron_h olmoe phimoe qwen2_moe qwen3_5_moe qwen3_5_moe_text qwen3_moe qwen3_next
    qwen3_omni_moe qwen3_omni_moe_thinker solar_open
    """.split()
)
_UNGATED = frozenset({"nemotron_h"})
_EXPERT = re.compile(r"(.*\.experts)\.([0-9]{1,6})\.(\w+)\.weight")
# An expert's projection on disk: the stacked live parameter, and which part of its output axis that is.
_GATE, _UP, _DOWN = ("gate_up_proj", (0, 2)), ("gate_up_proj", (1, 2)), ("down_proj", (0, 1))
_PROJECTIONS = {"gate_proj": _GATE, "up_proj": _UP, "down_proj": _DOWN, "w1": _GATE, "w3": _UP, "w2": _DOWN}
_UNGATED_PROJECTIONS = {"up_proj": ("up_proj", (0, 1)), "down_proj": _DOWN}
# Released with the last two axes of its stacked experts exchanged; transformers saves them as they are live.
_FLIPPED = frozenset({"qwen3_vl_moe"})
_BIASED = frozenset({"gpt_oss", "openai_privacy_filter"})
_IN_OUT = frozenset({"gpt_oss", "openai_privacy_filter", "aria", "aria_text"})

_CONV1D = dict.fromkeys(
    ("gpt2", "openai-gpt", "imagegpt", "decision_transformer"), ("c_attn", "q_attn", "c_proj", "c_fc")
) | dict.fromkeys(("clvp", "clvp_decoder"), ("mlp.c_proj", "mlp.c_fc"))
# Architectures without one. In transformers only those above have any; code of other people may.
_NO_CONV1D = frozenset(
    """
    albert apertus arcee bart bert bloom camembert clip codegen cohere cohere2 convnext convnextv2 deberta deberta-v2
    distilbert electra ernie4_5 esm exaone4 falcon falcon_h1 gemma gemma2 gemma3_text gemma3n gemma4 glm glm4
    gpt_bigcode gpt_neo gpt_oss gptj granite helium jetmoe lfm2 llama llama4 llama4_text longformer m2m_100 mamba mamba2
    marian mbart ministral mistral modernbert mpnet mpt mt5 nemotron olmo olmo2 olmo3 opt pegasus persimmon phi phi3
    qwen2 qwen3 qwen3_5 qwen3_vl qwen3_vl_moe resnet roberta seed_oss siglip siglip2 smollm3 stablelm starcoder2 t5 umt5
    wav2vec2 whisper xlm-roberta
    """.split()
)

# Ends of dotted names. The first of these that a model has is right for all architectures but those named below.
_INPUT_EMBEDDINGS = (
    *("shared", "embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings", "tokens_embed"),
    *("token_embedding", "word_embedding", "embeddings", "input_embedding"),
)
_OUTPUT_EMBEDDINGS = (
    *("lm_head.decoder", "lm_head.out_proj", "lm_head", "embed_out", "predictions.decoder", "proj_out", "lm_loss"),
    *("output_projection", "vocab_projector", "generator_lm_head", "pred_layer.proj"),
)
_INPUT_EMBEDDING = {"ctrl": "w"} | dict.fromkeys(("marian", "seamless_m4t", "seamless_m4t_v2"), "embed_tokens")
_OUTPUT_EMBEDDING = {"git": "output", "rwkv": "head"} | dict.fromkeys(
    ("modernbert", "modernbert-decoder", "bert-generation", "fnet", "nystromformer"), "decoder"
)
BASE_PREFIXES: tuple[str, ...] = (
    *("", "model.", "transformer.", "language_model.", "model.language_model.", "bert.", "roberta.", "distilbert."),
    *("vit.", "gpt_neox.", "deberta.", "electra.", "albert.", "resnet.", "vision_model.", "text_model.", "backbone."),
    *("encoder.", "decoder.", "base_model.", "thinker.", "vlm.", "timm_model.", "clip.", "swin.", "dinov2.", "beit."),
    *("deit.", "convnext.", "convnextv2.", "swinv2.", "segformer.", "wav2vec2.", "hubert.", "wavlm.", "mpnet."),
    *("mobilebert.", "longformer.", "layoutlm.", "layoutlmv3.", "funnel.", "rembert.", "roformer.", "luke.", "tapas."),
)
"""What a head class puts before the names of its base model: to be added or removed where names disagree."""


def live_places(
    model_type: str | None, disk_names: Iterable[str] | Mapping[str, Sequence[int]], inner_types: Iterable[str] = ()
) -> dict[str, tuple[Place, ...]]:
    """Say of every live tensor where it lies on disk.

    Live names are those of the class with a head (`model.language_model.layers...`). Every disk tensor is one place of
    the result: under its own name if it is live already, no rule knows it, another tensor bears its live name, or its
    stack lacks an expert. Adapters older than a rename hold disk names: look there where a live name is not found.

    Args:
        model_type: `model_type` of `config.json`; None applies no rule.
        disk_names: Names on disk, or a mapping of them to shapes; shapes are needed by `qwen3_vl_moe` only.
        inner_types: Types of the configurations inside `config.json`, as `types_inside` gives them.

    Returns:
        Live name to its places, experts in order of index and part.

    Raises:
        MatchError: Shapes are needed to tell how the experts are stored, and they are missing or contradict.
    """
    names = list(disk_names)
    if model_type is None:
        return {name: (Place(name),) for name in names}
    types = (model_type, *inner_types)
    rename, stacked = _renamer(types), not _STACKED.isdisjoint(types)
    projections = _PROJECTIONS if _UNGATED.isdisjoint(types) else _UNGATED_PROJECTIONS

    taken = set(names)
    found: dict[str, list[Place]] = {}
    for name in names:
        live, expert, part = rename(name), None, (0, 1)
        match = _EXPERT.fullmatch(live) if stacked and ".experts." in live else None
        if match and match[3] in projections:
            parameter, part = projections[match[3]]
            live, expert = f"{match[1]}.{parameter}", int(match[2])
        if live in taken:
            live, expert, part = name, None, (0, 1)
        found.setdefault(live, []).append(Place(name, expert, part))

    result: dict[str, tuple[Place, ...]] = {}
    for live, places in found.items():
        if _complete(places):
            result[live] = tuple(places)
        else:
            result |= {place.disk: (Place(place.disk),) for place in places}
    return _flip(result, disk_names) if model_type in _FLIPPED else result


def is_conv1d(model_type: str | None, module_name: str, inner_types: Iterable[str] = ()) -> bool | None:
    """Whether a module is transformers' `Conv1D`, whose weight is stored `(in, out)`; None where that is not known.

    >>> is_conv1d("gpt2", "transformer.h.0.attn.c_proj"), is_conv1d("gpt2", "lm_head"), is_conv1d("mine", "c_proj")
    (True, False, None)
    """
    ends = [end for name in (model_type, *inner_types) for end in _CONV1D.get(name or "", ())]
    if any(f".{module_name}".endswith(f".{end}") for end in ends):
        return True
    known = any(model_type in types for types in (_CONV1D, _NO_CONV1D, _STACKED)) or _rules_of(model_type or "")
    return False if known else None


def parameter_order(model_type: str | None, inner_types: Iterable[str] = ()) -> tuple[str, ...]:
    """Parameters of the live experts module in the order of registration.

    PEFT wraps them in this order, the first innermost (`base_layer.base_layer`), and writes no name of a parameter.

    >>> parameter_order("gpt_oss")
    ('gate_up_proj', 'gate_up_proj_bias', 'down_proj', 'down_proj_bias')
    """
    types = (model_type, *inner_types)
    if not _BIASED.isdisjoint(types):
        return ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")
    return ("gate_up_proj", "down_proj") if _UNGATED.isdisjoint(types) else ("up_proj", "down_proj")


def stored_transposed(model_type: str | None, parameter_name: str, inner_types: Iterable[str] = ()) -> bool:
    """Whether PEFT takes a stacked live parameter as `(experts, in, out)`, instead of `(experts, out, in)`.

    It asks the live module for `is_transposed`. Llama 4 computes with `(experts, in, out)` but lacks the attribute:
    False, since its `lora_A` is as wide as the last axis all the same.
    """
    stacked = parameter_name.rsplit(".", 1)[-1] in ("gate_up_proj", "down_proj")
    return stacked and not _IN_OUT.isdisjoint((model_type, *inner_types))


def input_embedding_names(model_type: str | None) -> tuple[str, ...]:
    """Ends of the dotted name that the input embedding may have, the likeliest first."""
    return tuple(dict.fromkeys([_INPUT_EMBEDDING.get(model_type or "", _INPUT_EMBEDDINGS[0]), *_INPUT_EMBEDDINGS]))


def output_embedding_names(model_type: str | None) -> tuple[str, ...]:
    """Ends of the dotted name that the output embedding may have, the likeliest first."""
    return tuple(dict.fromkeys([_OUTPUT_EMBEDDING.get(model_type or "", _OUTPUT_EMBEDDINGS[0]), *_OUTPUT_EMBEDDINGS]))


def types_inside(config: Mapping[str, object]) -> tuple[str, ...]:
    """Every `model_type` inside a `config.json` but its own, outermost first.

    >>> types_inside({"model_type": "llava", "text_config": {"model_type": "mixtral"}, "vision_config": {}})
    ('mixtral',)
    """
    found: list[str] = []
    pending: list[Mapping[str, object]] = [config]
    for outer in pending:
        inner = [value for value in outer.values() if isinstance(value, Mapping)]
        found += [name for value in inner if isinstance(name := value.get("model_type"), str)]
        pending += inner
    return tuple(dict.fromkeys(found))


def _complete(places: list[Place]) -> bool:
    """Sort the places in place; whether they are one whole tensor, or all parts of experts 0 to the last, each once."""
    if len(places) == 1 and places[0].expert is None:
        return True
    places.sort(key=lambda place: (place.expert or 0, place.part))
    parts = places[0].part[1]
    whole = [(place.expert, place.part) == (i // parts, (i % parts, parts)) for i, place in enumerate(places)]
    return all(whole) and len(places) % parts == 0


def _flip(
    places: dict[str, tuple[Place, ...]], shapes: Iterable[str] | Mapping[str, Sequence[int]]
) -> dict[str, tuple[Place, ...]]:
    """Mark stacked experts that lie transposed, which a pair of shapes tells: `(E, 2I, H)` and `(E, H, I)` is live."""
    result = dict(places)
    for gate in [name for name in places if name.endswith(".experts.gate_up_proj")]:
        down = gate.removesuffix("gate_up_proj") + "down_proj"
        pair = [shapes.get(name, ()) if isinstance(shapes, Mapping) else () for name in (gate, down)]
        if [len(shape) for shape in pair] != [3, 3]:
            message = f"{gate} and {down}: the shapes of both are needed to tell how they are stored"
            raise MatchError(message)
        (_, rows, columns), (_, down_rows, down_columns) = pair
        if rows == down_columns and columns == 2 * down_rows:
            # A square tensor is loaded as it lies: transformers compares shapes, and these agree.
            result |= {name: (Place(name, flipped=a != b),) for name, (_, a, b) in zip((gate, down), pair, strict=True)}
        elif (rows, columns) != (2 * down_columns, down_rows):
            message = f"{gate} {list(pair[0])} and {down} {list(pair[1])} do not fit together as experts"
            raise MatchError(message)
    return result


@cache
def _renamer(types: tuple[str, ...]) -> Callable[[str], str]:
    own = [*_rules_of(types[0]), *_parse(_LEGACY)]
    below = _INNER_RULES.get(types[0], "")
    nested = [rule for name in types[1:] for rule in _rules_of(name)] if types[0] in _INNER_RULES else []

    def rename(name: str) -> str:
        name = _apply(own, name)
        return below + _apply(nested, name.removeprefix(below)) if nested and name.startswith(below) else name

    return rename


def _apply(rules: list[_Rule], name: str) -> str:
    for hint, pattern, live in rules:
        # Most rules concern few names, and a search for a substring costs a tenth of one for a pattern.
        if hint in name:
            name = pattern.sub(live, name, count=1)
    return name


@cache
def _rules_of(model_type: str) -> tuple[_Rule, ...]:
    return tuple(rule for types, text in _RENAMES.items() if model_type in types.split() for rule in _parse(text))


def _parse(text: str) -> list[_Rule]:
    return [_rule(rule) for rule in re.split("[;\n]", text) if rule.strip()]


def _rule(text: str) -> _Rule:
    """A rule of the tables as (text that every match contains, pattern, replacement)."""
    disk, live = (side.strip() for side in text.split(">"))
    components = disk.removeprefix("^")
    left = "^" if disk.startswith("^") else r"(?:^|(?<=\.))"
    body = r"(\d+)".join(re.escape(piece) for piece in components.split("#"))
    for index in range(1, live.count("#") + 1):
        live = live.replace("#", rf"\g<{index}>", 1)
    right = r"(?=\.|$)" if live else r"\."
    return max(components.split("#"), key=len), re.compile(left + body + right), live
