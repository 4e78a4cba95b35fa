"""The reference models give what transformers gives, for every architecture and option, on every library."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import Batch, answer, assert_close, batches, berts, built, gpt2s, llamas, saved

SHARE = 1e-5


@pytest.mark.parametrize("family", [llamas, gpt2s])
def test_language_models(family, loaded, run, examples, to_numpy):
    @examples
    @given(drawn=family(), batch=batches())
    def agrees(drawn, batch: Batch):
        oracle = built(*drawn)
        with saved(oracle) as folder:
            model = loaded(folder)
        assert model.left_out == ()
        found = to_numpy(run(lambda weights: model(weights, batch.ids, batch.mask), model.weights))
        assert_close(found, answer(oracle, batch.ids, batch.mask).logits, SHARE, batch.mask)

    agrees()


def test_encoders(loaded, run, examples, to_numpy):
    @examples
    @given(drawn=berts(), batch=batches(), kinds=st.booleans())
    def agrees(drawn, batch: Batch, kinds: bool):
        oracle = built(*drawn)
        with saved(oracle) as folder:
            model = loaded(folder)
        more = {"token_type_ids": batch.ids % model.config.type_vocab_size} if kinds else {}
        found = to_numpy(run(lambda weights: model(weights, batch.ids, batch.mask, **more), model.weights))
        assert_close(found, answer(oracle, batch.ids, batch.mask, **more).logits, SHARE)

        inner = answer(oracle.bert, batch.ids, batch.mask, **more)
        hidden = run(lambda weights: model.hidden_states(weights, batch.ids, batch.mask, **more), model.weights)
        assert_close(to_numpy(hidden), inner.last_hidden_state, SHARE, batch.mask)
        assert_close(to_numpy(model.pool(model.weights, hidden)), inner.pooler_output, SHARE)
        kept = torch.ones(batch.ids.shape) if batch.mask is None else torch.asarray(batch.mask).float()
        mean = (inner.last_hidden_state * kept[:, :, None]).sum(1) / kept.sum(1, keepdim=True)
        for normalize, wanted in ((False, mean), (True, torch.nn.functional.normalize(mean))):
            options = more | {"normalize": normalize}
            vectors = run(lambda weights, o=options: model.embed(weights, batch.ids, batch.mask, **o), model.weights)
            assert_close(to_numpy(vectors), wanted, SHARE)

    agrees()


@pytest.mark.parametrize("family", [llamas, gpt2s])
def test_arrays_of_the_library_are_taken_as_lists_are(family, loaded, run, examples, asarray, to_numpy):
    @examples
    @given(drawn=family(), batch=batches())
    def agrees(drawn, batch: Batch):
        with saved(built(*drawn)) as folder:
            model = loaded(folder)
        mask = np.ones_like(batch.ids) if batch.mask is None else batch.mask
        from_lists = run(lambda weights: model(weights, batch.ids.tolist(), mask.tolist()), model.weights)
        from_arrays = run(lambda weights: model(weights, asarray(batch.ids), asarray(mask)), model.weights)
        assert_close(to_numpy(from_arrays), to_numpy(from_lists), SHARE, mask)

    agrees()
