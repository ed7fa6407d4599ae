"""The contrast on vocabularies of a few tokens, against numbers worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from acd_local.errors import NumericalError, UsageError
from acd_local.runtime.contrast import Divergence, contrast

INF = float("inf")


def f32(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


def test_plain_formula_of_the_paper() -> None:
    ids, scores = contrast(f32(2, 1, -3), f32(4, 0, -6), alpha=0.5, beta=0.0, raw=True)
    assert ids.tolist() == [0, 1, 2]
    np.testing.assert_allclose(scores, [0, 1, 0])


def test_scaled_by_one_minus_alpha_where_streams_agree_gives_the_logits_themselves() -> None:
    logits = f32(3, 2, 1)
    _, scores = contrast(logits, logits, alpha=0.5, beta=0.0)
    np.testing.assert_allclose(scores, logits, rtol=1e-6)


@pytest.mark.parametrize(("alpha", "divisor"), [(0.25, 0.75), (0.9, 0.1), (0.95, 0.1), (2.0, 0.1)])
def test_alpha_is_capped_in_the_divisor(alpha: float, divisor: float) -> None:
    _, scores = contrast(f32(1, 0), f32(0.5, 0), alpha=alpha, beta=0.0)
    np.testing.assert_allclose(scores, [(1 - alpha * 0.5) / divisor, 0], rtol=1e-5)


def test_implausible_tokens_are_dropped_from_the_list() -> None:
    safe = np.log(f32(0.5, 0.3, 0.15, 0.049, 0.001))
    ids, scores = contrast(safe, f32(0, 0, 0, -50, -50), alpha=0.5, beta=0.1)
    assert ids.tolist() == [0, 1, 2]
    assert len(scores) == 3
    assert np.isfinite(scores).all()


@pytest.mark.parametrize(("beta", "kept"), [(0.0, 4), (0.2, 3), (0.5, 2), (1.0, 1)])
def test_beta_is_a_share_of_the_largest_probability(beta: float, kept: int) -> None:
    safe = np.log(f32(0.4, 0.3, 0.2, 0.05))
    assert len(contrast(safe, None, alpha=0.0, beta=beta)[0]) == kept


def test_beta_one_keeps_ties() -> None:
    assert contrast(f32(1, 1, 0), None, alpha=0.0, beta=1.0)[0].tolist() == [0, 1]


def test_illegal_tokens_never_appear_even_with_beta_zero() -> None:
    assert contrast(f32(-INF, 1, -INF, 0), None, alpha=0.0, beta=0.0)[0].tolist() == [1, 3]


def test_no_legal_token_gives_an_empty_list() -> None:
    ids, scores = contrast(f32(-INF, -INF), f32(0, 0), alpha=0.5, beta=0.1)
    assert len(ids) == len(scores) == 0


def test_token_that_the_adversary_excludes_is_dropped() -> None:
    ids, _ = contrast(f32(3, 2.9), f32(-INF, 0), alpha=0.5, beta=0.1)
    assert ids.tolist() == [1]


def test_alpha_zero_does_not_read_the_adversary() -> None:
    ids, scores = contrast(f32(1, 0.5), f32(float("nan"), INF), alpha=0.0, beta=0.1)
    assert ids.tolist() == [0, 1]
    np.testing.assert_array_equal(scores, f32(1, 0.5))


@pytest.mark.parametrize("where", ["safe", "adversarial"])
@pytest.mark.parametrize("bad", [float("nan"), INF])
def test_nan_or_infinity_anywhere_is_an_error(where: str, bad: float) -> None:
    good, broken = f32(1, 0, -9), f32(1, 0, bad)
    safe, adversarial = (broken, good) if where == "safe" else (good, broken)
    with pytest.raises(NumericalError, match=where):
        contrast(safe, adversarial, alpha=0.5, beta=0.1)


def test_no_finite_score_is_an_error() -> None:
    with pytest.raises(NumericalError):
        contrast(f32(1, 0), f32(-INF, 0), alpha=0.5, beta=1.0)
    with pytest.raises(NumericalError):
        contrast(f32(1, 0), f32(-3, 0), alpha=3e38, beta=0.0)


@pytest.mark.parametrize("alpha", [-0.1, float("nan"), INF, -INF])
def test_alpha_out_of_range(alpha: float) -> None:
    with pytest.raises(UsageError, match="alpha"):
        contrast(f32(1, 0), f32(1, 0), alpha=alpha, beta=0.1)


@pytest.mark.parametrize("beta", [-0.1, 1.1, float("nan"), INF])
def test_beta_out_of_range(beta: float) -> None:
    with pytest.raises(UsageError, match="beta"):
        contrast(f32(1, 0), f32(1, 0), alpha=0.5, beta=beta)


def test_inputs_are_left_alone() -> None:
    safe, adversarial = f32(1, 0, -1), f32(0, 1, 2)
    before = safe.copy(), adversarial.copy()
    contrast(safe, adversarial, alpha=0.5, beta=0.0)
    np.testing.assert_array_equal(safe, before[0])
    np.testing.assert_array_equal(adversarial, before[1])


logits = arrays(np.float32, 12, elements=st.floats(-30, 30, width=32))


@given(logits, logits, st.floats(0, 3), st.floats(0, 1), st.booleans())
def test_agrees_with_the_definition(s: np.ndarray, a: np.ndarray, alpha: float, beta: float, raw: bool) -> None:
    ids, scores = contrast(s, a, alpha=alpha, beta=beta, raw=raw)
    p = np.exp(s.astype(np.float64) - s.max())
    clearly_in = np.flatnonzero(p >= beta * 1.0001)
    clearly_out = np.flatnonzero(p < beta * 0.9999)
    assert set(clearly_in) <= set(ids.tolist())
    assert not set(clearly_out) & set(ids.tolist())
    divisor = 1.0 if raw else 1 - min(alpha, 0.9)
    expected = (s[ids].astype(np.float64) - alpha * a[ids].astype(np.float64)) / divisor
    np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=1e-4)


@given(logits, logits)
def test_divergence_is_the_textbook_kl(s: np.ndarray, a: np.ndarray) -> None:
    log_p = s - np.logaddexp.reduce(s.astype(np.float64))
    log_q = a - np.logaddexp.reduce(a.astype(np.float64))
    expected = float((np.exp(log_p) * (log_p - log_q)).sum())
    assert Divergence(12)(s, a) == pytest.approx(expected, abs=2e-4, rel=1e-3)


def test_divergence_with_excluded_tokens() -> None:
    kl = Divergence(3)
    assert kl(f32(0, 0, -INF), f32(0, 0, 0)) == pytest.approx(np.log(1.5), rel=1e-6)
    assert kl(f32(0, 0, -INF), f32(0, 0, -INF)) == pytest.approx(0, abs=1e-7)
    assert kl(f32(0, 0, 0), f32(0, 0, -INF)) == INF
