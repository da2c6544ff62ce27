"""The kernels of attacks, privacy and members on sm_80 and sm_90, as in ``test_kernels``."""

import pytest
import test_clip_examples as clipping_of
import test_members as members_of
import test_perturb as perturb_of
from cards import card, variant_of

from fusemlp_kernels.contract import UpdateRule


@pytest.fixture(params=[(target, precision) for target in ("sm_80", "sm_90") for precision in ("fp32", "bf16")])
def variant(request):
    target, precision = request.param
    with card(target, precision):
        yield variant_of(target, precision)


def test_attacks(variant):
    perturb_of.test_a_start_and_a_step_are_those_of_the_definition(variant, "2", (0.1, 0.9))


def test_privacy(variant):
    layers = [(300, 41, True, True, (("owned",), "owned")), (13, 300, True, False, (("stepped",), "transposed"))]
    clipping_of.test_clip_examples.of_case(layers, 13, short=2, by_row=True, share=0.5, variant=variant, seed=3)
    clipping_of.test_update_adds_noise.of_case(
        [(13, 17), (300,)], UpdateRule("adam"), 0.5, 7.0, updates=6, counts=(5, 0, 3), parts=1, variant=variant, seed=4
    )


def test_members(variant, monkeypatch):
    monkeypatch.setattr(members_of, "shapes_of", lambda variant: members_of.SHAPES[1:3])
    members_of.test_affine_members_and_back(variant, "silu")
    members_of.test_the_first_factors_take_the_rows_of_a_batch(variant)
    members_of.test_heads_and_their_gradients(variant)
