"""Batches of which each row names its adapter: every row alone, PEFT's mixed batch, gradients, and what is refused."""

from __future__ import annotations

import warnings
from typing import Any

import pytest

from peftarray import ConfigError, LoraConfig, MatchError, PeftError, ShapeError, UnsupportedError, VeraConfig
from peftarray.model import get_peft_model

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
hypothesis = pytest.importorskip("hypothesis")

from hypothesis import strategies as st  # noqa: E402
from peftarray.backends import torch_rows  # noqa: E402

from .cases import CONFIGS  # noqa: E402
from .torch_net import Net, randomise, several  # noqa: E402

WHOLE = {"modules_to_save": ["lm_head"], "target_modules": ["q_proj"]}
ADAPTERS = {name: config for name, config in CONFIGS.items() if config.trained_biases() == "none"} | {
    "saved": LoraConfig(r=2, **WHOLE),
    "also": LoraConfig(r=3, **WHOLE),
    "ranks": LoraConfig(r=5, target_modules=["q_proj", "o_proj"], rank_pattern={"0.self_attn.q_proj": 1}),
}
NAMES = [name for name in ADAPTERS if name != "lora-embedding"]
close: dict[str, float] = {"atol": 1e-10, "rtol": 1e-8}


def mixed(*names: str, **options: Any) -> Any:
    """A model with these adapters; the last is active."""
    return several(ADAPTERS, *names, **options)


def ids(rows: int) -> Any:
    return torch.randint(0, 11, (rows, 3), generator=torch.Generator().manual_seed(rows))


def one_by_one(model: Any, x: Any, names: Any) -> Any:
    """Each row by itself, under its adapter."""
    outputs = []
    for row, name in zip(x, names, strict=True):
        if name in (None, "__base__"):
            with model.disable_adapter():
                outputs.append(model(row[None]))
        else:
            model.set_adapter(name)
            outputs.append(model(row[None]))
    return torch.cat(outputs)


@pytest.fixture(scope="module")
def everything() -> Any:
    return mixed(*NAMES)


@hypothesis.given(st.lists(st.sampled_from([*NAMES, None, "__base__"]), min_size=1, max_size=9))
@hypothesis.settings(max_examples=40, deadline=None)
def test_each_row_has_its_adapter(everything, names):
    x = ids(len(names))
    with torch.no_grad():
        wanted = one_by_one(everything, x, names)
        torch.testing.assert_close(everything(x, adapter_names=names), wanted, **close)


LOW_RANK = ["lora", "ranks", "lora-all-linear", "vera", "adalora"]


@hypothesis.given(st.lists(st.sampled_from([*LOW_RANK, None]), min_size=1, max_size=9), st.booleans())
@hypothesis.example(["lora", None], False)
@hypothesis.settings(max_examples=40, deadline=None)
def test_low_rank_rows_go_in_one_pass(everything, names, keeps_gradients):
    """In whatever order rows come, and when one batch follows another."""
    x = ids(len(names))
    with torch.set_grad_enabled(keeps_gradients):
        wanted = one_by_one(everything, x, names)
        everything.set_scale("vera", 0.5)
        scaled = one_by_one(everything, x, names)
        torch.testing.assert_close(everything(x, adapter_names=names), scaled, **close)
        everything.set_scale("vera", 1)
        torch.testing.assert_close(everything(x, adapter_names=names), wanted, **close)


@hypothesis.given(
    names=st.lists(st.sampled_from([*"abcd", None]), min_size=1, max_size=12).filter(any),
    tokens=st.integers(1, 6),
    rank=st.integers(1, 4),
    a_call=st.sampled_from([0, 40, 10**9]),
)
@hypothesis.settings(max_examples=150, deadline=None)
def test_however_rows_are_brought_together_each_gets_its_update(names, tokens, rank, a_call):
    """As they come, moved beside each other, or with factors that were moved."""
    generator = torch.Generator().manual_seed(len(names))
    sizes = [(len(names), tokens, 3), (len(names), tokens, 5), (5, rank, 3), (5, rank, 5)]
    x, y, down, up = (torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes)
    down[0], up[0] = 0, 0
    slots = {"a": 3, "b": 1, "c": 4, "d": 2}
    wanted = [
        own if name is None else own + given @ down[slots[name]].mT @ up[slots[name]]
        for own, given, name in zip(y, x, names, strict=True)
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_rows, "_A_CALL", a_call)
        found = torch_rows.Rows(tuple(names)).add_update(y, x, (down, up.mT), slots)
    assert found is y
    torch.testing.assert_close(found, torch.stack(wanted), **close)


def test_what_is_kept_of_a_batch_follows_the_parameters():
    model, x, names = mixed("lora", "ranks"), ids(3), ["lora", "ranks", "lora"]
    with torch.no_grad():
        before = model(x, adapter_names=names)
        model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj").lora_A.lora.weight.mul_(3)
        assert (model(x, adapter_names=names) - before)[0].abs().max() > 1e-6
        torch.testing.assert_close(model(x, adapter_names=names), one_by_one(model, x, names), **close)
        other = mixed("ranks", "lora")
        model.load_state_dict(other.state_dict(), strict=True)
        torch.testing.assert_close(model(x, adapter_names=names), one_by_one(other, x, names), **close)
        model.hotswap("lora", other.get_adapter("ranks"))
        torch.testing.assert_close(model(x, adapter_names=names), one_by_one(other, x, ["ranks"] * 3), **close)
    model = model.float()
    assert model(x, adapter_names=names).dtype == torch.float32


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_each_row_alone(name):
    other = "oft" if name != "oft" else "lora"
    model = mixed(name, other).train()
    x, names = ids(5), [name, other, None, name, other]

    def gradients(run: Any) -> dict[str, Any]:
        model.set_adapter(other)
        for parameter in model.parameters():
            parameter.grad = None
            parameter.requires_grad_(True)
        (run() ** 2).sum().backward()
        return {key: p.grad for key, p in model.named_parameters() if p.grad is not None}

    found = gradients(lambda: model(x, adapter_names=names))

    def alone() -> Any:
        outputs = []
        for row, adapter in zip(x, names, strict=True):
            with model.disable_adapter():
                plain = model(row[None])
            if adapter is not None:
                model.set_adapter(adapter)
                for parameter in model.parameters():
                    parameter.requires_grad_(True)
            outputs.append(plain if adapter is None else model(row[None]))
        return torch.cat(outputs)

    wanted = gradients(alone)
    for key in wanted.keys() | found.keys():
        torch.testing.assert_close(found.get(key, torch.zeros(1)), wanted.get(key, torch.zeros(1)), **close, msg=key)


@pytest.mark.parametrize("names", [["lora", "ranks", "lora-all-linear"], ["saved", "also"]], ids="+".join)
def test_a_mixed_batch_is_that_of_peft(names, tmp_path):
    ours = mixed(*names)
    ours.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(Net(), tmp_path / names[0], adapter_name=names[0])
        for name in names[1:]:
            theirs.load_adapter(tmp_path / name, name)
    rows = [names[1], "__base__", names[0], names[-1], names[1], names[0]]
    x = ids(len(rows))
    theirs.double().eval()
    torch.testing.assert_close(ours(x, adapter_names=rows), theirs(x, adapter_names=rows), **close)


def test_dropout_is_an_adapters_own():
    model = mixed("lora")
    model.add_adapter("wet", LoraConfig(r=2, lora_dropout=0.5, init_lora_weights=False, target_modules=["q_proj"]))
    model.train()
    x, names = ids(4), ["lora", "wet", "lora", None]
    first, second = model(x, adapter_names=names), model(x, adapter_names=names)
    changed = (first - second).abs().amax((1, 2)) > 1e-6
    assert changed.tolist() == [False, True, False, False]


def test_rows_of_a_tied_head_follow_their_adapters():
    tokens = LoraConfig(r=2, trainable_token_indices=[7, 1], target_modules=["q_proj"])
    model = randomise(get_peft_model(Net(tied=True), tokens, adapter_name="first"))
    model.add_adapter("second", LoraConfig(r=2, trainable_token_indices=[3], target_modules=["q_proj"]))
    model.set_adapter("second")
    randomise(model)
    x, names = torch.tensor([[1, 7, 3]] * 4), ["first", "second", None, "first"]
    torch.testing.assert_close(model(x, adapter_names=names), one_by_one(model, x, names), **close)
    model.set_adapter(["first", "second"])
    wanted = model(x)
    merged = model.merge_and_unload()
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    torch.testing.assert_close(merged(x), wanted, **close)


def tiny_llama() -> Any:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}], ids=str)
def test_each_row_is_generated_with_its_adapter(options):
    config = LoraConfig(r=4, init_lora_weights=False, target_modules="all-linear")
    model = get_peft_model(tiny_llama(), config, adapter_name="a", seed=1)
    model.add_adapter("b", VeraConfig(r=4, d_initial=3.0, target_modules=["q_proj", "down_proj"]))
    model.add_adapter("c", LoraConfig(r=2, use_dora=True, init_lora_weights=False, target_modules=["v_proj"]), seed=2)
    model.eval()
    rows = torch.randint(3, 32, (4, 5), generator=torch.Generator().manual_seed(0))
    names = ["c", "a", None, "b"]
    kept = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(rows), **options}
    found = model.generate(rows, adapter_names=names, **kept)
    times, outputs = options.get("num_return_sequences", 1), []
    kept["attention_mask"] = torch.ones_like(rows[:1])
    for row, name in zip(rows, names, strict=True):
        model.set_adapter(name or "a")
        with model.disable_adapter() if name is None else warnings.catch_warnings():
            outputs.append(model.generate(row[None], **kept))
    assert len(found) == times * len(rows)
    length = found.shape[1]
    wanted = torch.cat([torch.nn.functional.pad(output, (0, length - output.shape[1])) for output in outputs])
    assert torch.equal(found, wanted)
    assert model._switch.now.rows is None


WRONG: dict[str, tuple[Any, type[PeftError], str]] = {
    "unknown": (["lora", "lra", None], MatchError, "nearest: lora"),
    "too few": (["lora"], ShapeError, "1 adapter_names are given, and the batch has 3 rows"),
    "a word": ("lora", MatchError, "a list with the name"),
    "none": ([], MatchError, "a list with the name"),
}


@pytest.mark.parametrize("case", WRONG)
def test_names_that_fit_nothing_are_refused(case):
    model, (names, kind, words) = mixed("lora", "oft"), WRONG[case]
    wanted = model(ids(3))
    with pytest.raises(kind, match=words):
        model(ids(3), adapter_names=names)
    torch.testing.assert_close(model(ids(3)), wanted, atol=0, rtol=0)


def test_a_batch_that_fails_leaves_no_names_behind():
    model = mixed("lora", "oft")
    wanted = model(ids(2))
    with pytest.raises(IndexError):
        model(torch.tensor([[99], [1]]), adapter_names=["lora", None])
    torch.testing.assert_close(model(ids(2)), wanted, atol=0, rtol=0)


def test_what_cannot_be_told_apart_is_refused():
    model = randomise(get_peft_model(Net(), CONFIGS["lora-tokens"], adapter_name="biases"))
    with pytest.raises(UnsupportedError, match="for a whole batch"):
        model(ids(2), adapter_names=["biases", None])
    with model.merged(), pytest.raises(ConfigError, match="is merged"):
        model(ids(2), adapter_names=[None, None])
    with model.disable_adapter(), pytest.raises(ConfigError, match="disabled"):
        model(ids(2), adapter_names=[None, None])
    attention = torch.nn.MultiheadAttention(8, 2, batch_first=True)
    reads = get_peft_model(attention, LoraConfig(target_modules=["out_proj"]))
    x = torch.randn(2, 3, 8)
    with pytest.raises(UnsupportedError, match="reads the weight of out_proj without calling it"):
        reads(x, x, x, adapter_names=["default", None])
    llama = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"])).train()
    llama.activation_checkpointing_enable()
    with pytest.raises(UnsupportedError, match="gradient checkpointing"):
        llama(torch.ones(1, 2, dtype=torch.int64), adapter_names=["default"])
