"""Each logits transform against its processor in transformers + torch, on random logits; run by `make parity`."""

import numpy as np
import pytest

from tests.goldens.make_transform_goldens import CASES, inputs, ours, theirs

pytestmark = pytest.mark.parity


@pytest.mark.parametrize("name", CASES)
def test_a_transform_is_its_processor(name):
    for seed in range(1, 21):
        given = inputs(seed)
        np.testing.assert_allclose(ours(name, **given), theirs(name, **given), rtol=1e-6, atol=1e-6, err_msg=str(seed))
