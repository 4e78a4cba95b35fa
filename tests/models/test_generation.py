"""Writing on: kept keys change nothing, the likeliest tokens are those of transformers, and draws follow their law."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import VOCABULARY, Batch, assert_close, batches, built, gpt2s, llamas, saved
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from peftarray import models
from peftarray.errors import PeftError
from peftarray.models.generation import probabilities

FAMILIES = pytest.mark.parametrize("family", [llamas, gpt2s])


@FAMILIES
def test_kept_keys_and_values_change_nothing(family, loaded, run, examples, to_numpy):
    @examples
    @given(drawn=family(), batch=batches(longest=10), first=st.integers(1, 10), second=st.integers(1, 10))
    def agrees(drawn, batch: Batch, first: int, second: int):
        with saved(built(*drawn)) as folder:
            model = loaded(folder)
        whole = to_numpy(run(lambda weights: model.hidden_states(weights, batch.ids, batch.mask), model.weights))
        cache, parts = models.Cache(), []
        ends = sorted({min(end, batch.ids.shape[1]) for end in (first, first + second, 99)})
        for start, end in zip([0, *ends], ends, strict=False):
            mask = None if batch.mask is None else batch.mask[:, :end]
            hidden, after = model.step(model.weights, batch.ids[:, start:end], cache, mask)
            assert (cache.length, after.length) == (start, end)
            parts.append(to_numpy(hidden))
            cache = after
        assert_close(np.concatenate(parts, axis=1), whole, 1e-5, batch.mask)

    agrees()


@FAMILIES
@settings(max_examples=40)
@given(data=st.data(), batch=batches(longest=8, sides=("left",)), count=st.integers(1, 12))
def test_the_likeliest_tokens_are_those_of_transformers(family, data, batch: Batch, count: int):
    oracle = built(*data.draw(family()), seed=data.draw(st.integers(0, 99)))
    ends = data.draw(st.lists(st.integers(1, VOCABULARY - 1), min_size=1, max_size=8, unique=True))
    oracle.generation_config.eos_token_id = ends
    with saved(oracle) as folder:
        model = models.load(folder)
    found = model.generate(model.weights, batch.ids, batch.mask, max_new_tokens=count)
    mask = np.ones_like(batch.ids) if batch.mask is None else batch.mask
    # Without a cache: where a window is 1, the cache of transformers keeps what has left the window.
    wanted = oracle.generate(
        torch.asarray(batch.ids),
        attention_mask=torch.asarray(mask),
        max_new_tokens=count,
        do_sample=False,
        use_cache=False,
    )
    np.testing.assert_array_equal(found, wanted.numpy())
    assert found.dtype == np.int64


def test_every_library_writes_the_same(loaded, xp):
    with saved(
        built("LlamaForCausalLM", {"num_hidden_layers": 1, "hidden_size": 8, "num_attention_heads": 2})
    ) as folder:
        model, here = loaded(folder), models.load(folder)
    prompts = [[3, 4, 5], [6, 7, 8]]
    for options in ({}, {"temperature": 1.5, "top_k": 20, "top_p": 0.9, "seed": 5}):
        texts = model.generate(model.weights, prompts, max_new_tokens=6, eos_token_id=(), **options)
        np.testing.assert_array_equal(
            texts, here.generate(here.weights, prompts, max_new_tokens=6, eos_token_id=(), **options)
        )
        assert texts.shape == (2, 9)


def test_a_seed_says_what_is_drawn():
    model = models.create(TINY)
    texts = [
        model.generate(model.weights, [[3]] * 8, max_new_tokens=8, temperature=1.0, seed=seed) for seed in (0, 0, 1)
    ]
    np.testing.assert_array_equal(texts[0], texts[1])
    assert (texts[0] != texts[2]).any()
    assert len({tuple(text) for text in texts[0].tolist()}) == 8  # each text draws for itself


TINY = {
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


@settings(max_examples=200)
@given(
    # Apart by more than rounding: which of two equal ones is kept is nobody's rule.
    st.lists(
        st.lists(st.integers(-72, 72).map(lambda n: n / 8), min_size=6, max_size=6, unique=True), min_size=1, max_size=3
    ),
    st.floats(0.2, 3.0),
    st.none() | st.integers(1, 9),
    st.none() | st.floats(0.05, 1.0),
)
def test_what_is_drawn_with(rows, temperature, top_k, top_p):
    scores = TemperatureLogitsWarper(temperature)(None, torch.tensor(rows, dtype=torch.float64))
    if top_k is not None:
        scores = TopKLogitsWarper(top_k)(None, scores)
    if top_p is not None:
        scores = TopPLogitsWarper(top_p)(None, scores)
    found = probabilities(np.asarray(rows, np.float32), temperature, top_k, top_p)
    np.testing.assert_allclose(found, scores.softmax(-1).numpy(), rtol=1e-9, atol=1e-12)


def test_draws_follow_their_probabilities():
    model = models.create(TINY)
    prompt = [[3]] * 4000
    drawn = model.generate(model.weights, prompt, max_new_tokens=1, temperature=0.05, top_k=5, seed=2)[:, 1]
    logits = model(model.weights, prompt[:1])[0, -1]
    share = probabilities(logits[None], 0.05, 5, None)[0]
    counts = np.bincount(drawn, minlength=VOCABULARY)
    assert (counts[share == 0] == 0).all()
    # Four standard deviations of a binomial count.
    assert (np.abs(counts - 4000 * share) <= 4 * np.sqrt(4000 * share * (1 - share))).all()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0; it must be at least 1"),
        ({"temperature": -1.0}, "temperature is -1.0; it must be 0 or more"),
        ({"temperature": 1.0, "top_k": 0}, "top_k is 0; it must be None or at least 1"),
        ({"temperature": 1.0, "top_p": 1.5}, "top_p is 1.5; it must be None, or above 0 and at most 1"),
        ({"top_p": 0.5}, "a temperature of 0 draws nothing"),
        ({"max_new_tokens": 9999}, "2 tokens and 9999 new ones are more than the 2048 that this model takes"),
        ({"attention_mask": [[1, 0]]}, "a prompt ends in padding"),
    ],
)
def test_settings_that_are_refused(options, words):
    model = models.create(TINY)
    with pytest.raises(PeftError) as caught:
        model.generate(model.weights, [[3, 4]], **({"max_new_tokens": 3} | options))
    assert words in str(caught.value)
