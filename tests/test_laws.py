"""Scaling laws: published constants come back from data made of them, published tables from the published constants."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import optimize

from allyouneed.core.errors import InputError
from allyouneed.evaluate import fits, frontiers, laws
from allyouneed.evaluate.laws import BESIROGLU, HOFFMANN, KAPLAN, LAWS, TABLE, HoffmannLoss, KaplanSteps, PowerLaw
from allyouneed.papers import chinchilla, ladders, scaling_laws
from allyouneed.papers.base import Report

# Kaplan et al. 2020, eqs. 1.1, 1.2 and 1.4 and table 3; Hoffmann et al. 2022, eq. 10 as printed
KAPLAN_SIZE, KAPLAN_DATA = PowerLaw.falling(8.8e13, 0.076), PowerLaw.falling(5.4e13, 0.095)
KAPLAN_BATCH = PowerLaw(2e8, -1 / 0.21)  # tokens, of L
KAPLAN_STEPS = KaplanSteps(N_c=6.5e13, S_c=2.1e3, alpha_N=0.077, alpha_S=0.76)
HOFFMANN_PRINTED = HoffmannLoss(E=1.69, A=406.4, B=410.7, alpha=0.34, beta=0.28)

BY_NAME = {law.name: law for law in LAWS}


def grid(n: tuple[float, float], d: tuple[float, float], points: int) -> tuple[np.ndarray, np.ndarray]:
    """`points` sizes by as many amounts of data, evenly spread in logarithms between two powers of ten."""
    N, D = np.meshgrid(np.logspace(*n, points), np.logspace(*d, points))
    return N.ravel(), D.ravel()


def noisy(law, x: np.ndarray, y: np.ndarray, seed: int, noise: float = 0.01) -> np.ndarray:
    exact = np.array([law(*point) for point in zip(x, y, strict=True)])
    return exact * np.exp(noise * np.random.default_rng(seed).standard_normal(len(x)))


# fits: recovery from 1 % of noise


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("law", [KAPLAN_SIZE, KAPLAN_DATA, laws.KAPLAN_COMPUTE, KAPLAN_BATCH])
def test_kaplan_s_power_laws_come_back(law: PowerLaw, seed: int):
    """40 runs over eight decades, about as wide as the paper's figure 1; of B_crit over one decade of loss."""
    x = np.logspace(0.2, 1.2, 40) if law is KAPLAN_BATCH else np.logspace(3, 11, 40)
    y = np.array([law(value) for value in x]) * np.exp(0.01 * np.random.default_rng(seed).standard_normal(40))
    assert abs(fits.power_law(x, y).exponent / law.exponent - 1) < 0.01


@pytest.mark.parametrize("seed", range(3))
def test_kaplan_s_exponents_of_size_and_data_come_back(seed: int):
    """24 × 24 runs: sizes from the paper's smallest to a hundred times its largest, data over five decades."""
    N, D = grid((3, 11), (7, 12), 24)
    found = fits.kaplan(N, D, noisy(KAPLAN, N, D, seed))
    assert abs(found.alpha_N / KAPLAN.alpha_N - 1) < 0.01
    assert abs(found.alpha_D / KAPLAN.alpha_D - 1) < 0.01


@pytest.mark.parametrize("seed", range(3))
def test_kaplan_s_exponents_of_size_and_steps_come_back(seed: int):
    N, S = grid((3, 9), (2, 6), 24)
    found = fits.kaplan_steps(N, S, noisy(KAPLAN_STEPS, N, S, seed))
    assert abs(found.alpha_N / KAPLAN_STEPS.alpha_N - 1) < 0.01
    assert abs(found.alpha_S / KAPLAN_STEPS.alpha_S - 1) < 0.01


@pytest.mark.parametrize(("law", "seed"), [(HOFFMANN, 0), (HOFFMANN, 1), (HOFFMANN, 2), (BESIROGLU, 0)])
def test_hoffmann_s_constants_come_back(law: HoffmannLoss, seed: int):
    """60 × 60 runs over seven decades of either: A and B stand one long way from the data, N = D = 1, so that their
    standard errors are some ten times those of the exponents; on the paper's own 400 runs they would be 20 %.
    """
    N, D = grid((5, 12), (7, 14), 60)
    found = fits.hoffmann(N, D, noisy(law, N, D, seed))
    for name in ("E", "A", "B", "alpha", "beta"):
        assert abs(getattr(found, name) / getattr(law, name) - 1) < 0.02, name


def test_nothing_fits_better_than_what_was_found():
    """scipy's L-BFGS from our answer and from forty others, on Hoffmann's objective written out; a typical ladder."""
    N, D = grid((4, 6), (5, 7), 5)
    L = noisy(HoffmannLoss(E=1.2, A=30.0, B=60.0, alpha=0.4, beta=0.35), N, D, seed=7)

    def objective(t: np.ndarray) -> float:
        e, a, b, alpha, beta = t
        r = np.abs(np.logaddexp(np.logaddexp(a - alpha * np.log(N), b - beta * np.log(D)), e) - np.log(L))
        return float(np.where(r <= 1e-3, r**2 / 2, 1e-3 * (r - 5e-4)).sum())

    found = fits.hoffmann(N, D, L)
    ours = np.array([np.log(found.E), np.log(found.A), np.log(found.B), found.alpha, found.beta])
    draw = np.random.default_rng(0)
    starts = [ours, *(draw.uniform([-1, 0, 0, 0, 0], [1, 25, 25, 2, 2]) for _ in range(40))]
    theirs = min(optimize.minimize(objective, start, method="L-BFGS-B").fun for start in starts)
    assert objective(ours) <= theirs * (1 + 1e-6)


@pytest.mark.parametrize("fit", [fits.kaplan, fits.kaplan_steps], ids=["size and data", "size and steps"])
def test_scipy_finds_the_same_least_squares(fit):
    law = KAPLAN if fit is fits.kaplan else KAPLAN_STEPS
    x, y = grid((4, 8), (3, 9), 5)
    L = noisy(law, x, y, seed=3)
    found = fit(x, y, L)

    def residuals(t: np.ndarray) -> np.ndarray:
        return np.log([type(law)(*np.exp(t))(*point) for point in zip(x, y, strict=True)]) - np.log(L)

    ours = np.log(list(vars(found).values()))
    theirs = optimize.least_squares(residuals, ours, xtol=1e-14, ftol=1e-14, gtol=1e-14)
    assert (residuals(ours) ** 2).sum() <= (theirs.fun**2).sum() * (1 + 1e-6)


def test_the_critical_batch_comes_back():
    """Of S and E that lie on the paper's hyperbola (eq. 5.1), with 1 % of noise."""
    S_min, E_min = 2000.0, 4e8
    S = S_min * np.logspace(0.05, 2, 30)
    E = E_min / (1 - S_min / S)
    noise = np.exp(0.01 * np.random.default_rng(0).standard_normal((2, 30)))
    found = fits.critical_batch(S * noise[0], E * noise[1])
    assert np.allclose(found, (S_min, E_min, E_min / S_min), rtol=0.03)


# the three approaches, on curves without noise


def test_approaches_one_and_two_find_the_closed_form_frontier():
    law = BESIROGLU
    sizes, budgets = np.logspace(7.5, 10.5, 25), np.logspace(18.5, 21.5, 7)
    compute = np.logspace(17, 23, 400)
    curves = [frontiers.Curve(N, compute, [law(N, C / (6 * N)) for C in compute]) for N in sizes]
    found = frontiers.envelope(curves)
    assert abs(found.frontier.exponent - law.frontier.exponent) < 0.005
    assert abs(found.frontier(1e20) / law.frontier(1e20) - 1) < 0.05
    near = [(C, law.frontier(C) * factor) for C in budgets for factor in np.logspace(-0.5, 0.5, 9)]
    C, N = np.array(near).T
    minima = frontiers.profiles(C, N, [law(n, c / (6 * n)) for c, n in near])
    assert all(one.inside for one in minima)
    assert all(abs(one.parameters / law.frontier(one.compute) - 1) < 0.05 for one in minima)  # no true parabola
    assert abs(frontiers.frontier(minima).exponent - law.frontier.exponent) < 0.002
    assert all(abs(one(one.parameters) - one.loss) < 1e-12 for one in minima)


def test_a_minimum_beyond_the_sizes_tried_is_said_to_be_so():
    (one,) = frontiers.profiles([1.0] * 3, [1e3, 1e4, 1e5], [3.0, 2.0, 1.5])
    assert not one.inside and one.parameters > 1e5


# intervals


def test_intervals_hold_the_truth_and_narrow_with_more_runs():
    def fit(runs: np.ndarray) -> dict[str, float]:
        return {"exponent": fits.power_law(*runs.T).exponent}

    def of(count: int) -> tuple[float, float]:
        x = np.logspace(1, 3, count)
        y = 5 * x**-0.3 * np.exp(0.05 * np.random.default_rng(0).standard_normal(count))
        found, refused = fits.intervals(np.stack((x, y), 1), fit)
        assert refused == 0
        return found["exponent"].low, found["exponent"].high

    (low, high), (lower, higher) = of(200), of(20)
    assert low < -0.3 < high and lower < -0.3 < higher
    assert high - low < 0.6 * (higher - lower)


def test_resamples_keep_their_strata_and_refused_ones_are_drawn_again():
    runs, drawn, asked = np.array([[1.0, 1], [2, 1], [3, 1], [10, 2], [20, 2], [30, 2]]), [], []

    def fit(sample: np.ndarray) -> dict[str, float]:
        asked.append(sample)
        fits.different("test", x=sample[:3, 0])  # refuses a third of the resamples and more
        drawn.append(sample[:, 1].tolist())
        return {"mean": sample[:, 0].mean()}

    found, refused = fits.intervals(runs, fit, strata=runs[:, 1], resamples=50)
    assert refused == len(asked) - 51 > 0
    assert found["mean"].low <= found["mean"].estimate == 11.0 <= found["mean"].high
    assert all(labels == [1, 1, 1, 2, 2, 2] for labels in drawn) and len(drawn) == 51


# the verdict of `scaling_laws`, on made ladders


def made(loss, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A ladder as large as that of the laptop size, and the largest run: N, D, L each, a nat of which is entropy."""
    config = scaling_laws.PAPER.sizes["laptop"]
    *sizes, last = [one.model.num_parameters(embeddings=False) for one in (*config.sizes, config.largest)]
    N, D = np.array([*((n, d) for n in sizes for d in config.budgets), (last, config.largest_tokens)]).T
    runs = np.column_stack((N, D, 1 + noisy(loss, N, D, seed, noise=0.02)))
    return runs[:-1], runs[-1]


@pytest.mark.parametrize(
    ("loss", "failing"),
    [
        (laws.KaplanLoss(N_c=2e3, D_c=3e4, alpha_N=0.3, alpha_D=0.4), None),
        (lambda N, D: 0.5 * (3e4 / N) ** 0.2 * (6e5 / D) ** 0.2, "over that of a plane"),
        (lambda N, D: 0.5 * (3e4 / N) ** 0.3, "of a law without D"),
        (lambda N, D: 0.5 * (6e5 / D) ** 0.3, "ladders that the law can be fitted to"),
    ],
    ids=["Kaplan's law", "a product of powers", "size alone", "data alone"],
)
def test_the_rule_knows_kaplan_s_law_from_what_lacks_an_end_or_a_term(loss, failing: str | None, tmp_path):
    report = Report(slug="scaling_laws", seeds=range(3), folder=tmp_path, evidence="small world", quiet=True)
    ladders, largest = zip(*(made(loss, seed) for seed in range(3)), strict=True)
    scaling_laws.judge(scaling_laws.PAPER.sizes["laptop"], report, ladders, np.array(largest), 1.0)
    failed = [check.name for check in report.checks if check.passed is False]
    assert any(failing in name for name in failed) if failing else not failed


# the verdict of `chinchilla`, on made runs


@pytest.mark.parametrize(
    ("law", "failing"),
    [
        (HoffmannLoss(E=0.76, A=78.0, B=610.0, alpha=0.6, beta=0.6), set()),
        (HoffmannLoss(E=0.76, A=0.92, B=6.0e6, alpha=0.15, beta=1.35), {"a, approach 3, parametric fit"}),
    ],
    ids=["a is a half", "a is 0.9"],
)
def test_chinchilla_s_rule_passes_where_a_is_a_half_and_fails_where_it_is_not(law, failing, tmp_path, monkeypatch):
    def learn(config, world, member, seed, folder) -> dict[str, list[float]]:
        tokens = [member.training.steps * config.batch_tokens * i // 16 for i in range(4, 17)]
        chance = np.random.default_rng([seed, *tokens, member.model.dim]).standard_normal(len(tokens))
        losses = [law(member.model.num_parameters(), D) + 0.005 * x for D, x in zip(tokens, chance, strict=True)]
        return {"tokens": tokens, "losses": losses}

    monkeypatch.setattr(ladders, "learn", learn)
    report = Report(slug="chinchilla", seeds=range(3), folder=tmp_path, evidence="small world", quiet=True)
    chinchilla.run(chinchilla.PAPER.sizes["laptop"].replace(resamples=12), report)
    outcomes = {check.name: check.passed for check in report.checks}
    assert "a, approach 2 minus approach 3" in outcomes
    assert all(outcomes.values()) if not failing else failing <= {name for name in outcomes if outcomes[name] is False}


# bad input


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fits.power_law([1, 2], [3, 4]), "power law: 2 runs are too few for a fit; give at least 3"),
        (lambda: fits.power_law([1, 2, 0], [3, 4, 5]), "power law: x holds 0; a power law takes finite values above 0"),
        (lambda: fits.power_law([1, 2, 2], [3, 4, 5]), "x takes 2 different values; a fit needs at least 3"),
        (lambda: fits.power_law([1, 2, 3], [3, np.nan, 5]), "y holds nan"),
        (lambda: fits.hoffmann([1, 2, 3], [1, 2, 3], [1, -1, 1]), "losses holds -1"),
        (lambda: fits.kaplan([1, 1, 1], [1, 2, 3], [1, 1, 1]), "parameters takes 1 different values"),
        (lambda: fits.critical_batch([1, 2, 3], [1, 3, 9]), "larger batches do not save steps here"),
        (lambda: fits.kaplan(*grid((3, 5), (4, 6), 3), [2.0] * 9), "the losses do not fall as powers of both columns"),
        (lambda: frontiers.envelope([]), "envelope: 0 curves are too few; give at least 3"),
        (lambda: frontiers.profiles([1, 1, 1], [1, 2, 4], [1, 2, 1]), "the losses have no minimum over size"),
        (lambda: frontiers.profiles([1, 1, 2], [1, 2, 4], [1, 2, 1]), "IsoFLOP profile of 1 FLOPs: 2 runs are too few"),
        (
            lambda: BY_NAME["Kaplan"].of_compute(1e6),
            r"compute=1e\+06: by the law .Kaplan. that is for .* fewer than the smallest",
        ),
        (lambda: BY_NAME["Besiroglu"].of_parameters(500), "parameters=500: by the law .Besiroglu. that is for 500"),
        (lambda: BY_NAME["Hoffmann 1"].of_tokens(-1), "tokens=-1; it must be a finite number above 0"),
        (lambda: BY_NAME["Hoffmann 1"].of_parameters(float("inf")), "parameters=inf"),
    ],
)
def test_what_cannot_be_fitted_or_planned_is_said_in_one_line(call, message):
    with pytest.raises(InputError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


# the calculators


def test_the_optimum_is_the_optimum():
    """The closed form against all sizes tried."""
    for law in (HOFFMANN, BESIROGLU):
        C = 3e20
        sizes = np.logspace(7, 12, 20_001)
        least = min(sizes, key=lambda N: law(N, C / (6 * N)))
        assert abs(law.frontier(C) / least - 1) < 1e-3


def test_hoffmann_s_head_to_head():
    """Hoffmann et al. 2022, sec. D.4: for 1e21 FLOPs Kaplan et al. would take 4.68 billion, approach 1 2.86 billion."""
    assert round(BY_NAME["Kaplan"].of_compute(1e21).parameters / 1e9, 2) == 4.68
    assert round(BY_NAME["Hoffmann 1"].of_compute(1e21).parameters / 1e9, 2) == 2.86


# Of N at the table's C, and of C at the table's N, about twice as much since C ∝ N^(1/a). Approaches 1 and 2 are the
# line through their own columns: what is tested is that these are a line, within 0.6 % of N but for the row of 67 B,
# Gopher's budget and its best size rounded. Approach 3 is computed from the unrounded constants, which are not quite
# those that the table was made with: its columns rise as C^0.459, eq. 4 with these constants as C^0.457.
TOLERANCES = {"Hoffmann 1": (0.013, 0.03), "Hoffmann 2": (0.034, 0.07), "Hoffmann 3": (0.075, 0.185)}


@pytest.mark.parametrize("row", TABLE, ids=lambda row: f"{row[0]:g}")
@pytest.mark.parametrize("approach", [1, 2, 3])
def test_tables_3_and_a3(approach: int, row: tuple[float, ...]):
    law, parameters, compute = BY_NAME[f"Hoffmann {approach}"], row[0], row[2 * approach - 1]
    of_size, of_compute = TOLERANCES[law.name]
    assert abs(law.of_compute(compute).parameters / parameters - 1) < of_size
    assert abs(law.of_parameters(parameters).compute / compute - 1) < of_compute


@pytest.mark.parametrize("row", TABLE, ids=lambda row: f"{row[0]:g}")
@pytest.mark.parametrize("approach", [1, 2, 3])
def test_the_tables_spend_six_n_d(approach: int, row: tuple[float, ...]):
    """As printed, to the two digits of the tokens; so the slip of the exponent shows."""
    parameters, compute, tokens = row[0], row[2 * approach - 1], row[2 * approach]
    assert abs(laws.training_flops(parameters, tokens) / compute - 1) < 0.05


def test_rounded_constants_are_far_off():
    """By 30 % of the parameters at the end of table A3: why the unrounded ones are the preset."""
    assert 0.65 < HOFFMANN_PRINTED.frontier(8.55e28) / 10e12 < 0.72


def test_ten_times_the_compute():
    """Kaplan's 5.5 × and 1.8 ×, as Hoffmann et al. 2022 (sec. 1) quote them, and their own 3.2 × and 3.2 ×.

    10^0.73 is 5.4, hence the 4 %.
    """
    assert BY_NAME["Kaplan"].growth() == pytest.approx((5.5, 1.8), rel=0.04)
    for approach, (a, b) in {1: (0.50, 0.50), 2: (0.49, 0.51), 3: (0.46, 0.54)}.items():  # table 2
        assert BY_NAME[f"Hoffmann {approach}"].growth() == pytest.approx((10**a, 10**b), rel=0.015)
    assert BY_NAME["Hoffmann 1"].growth() == pytest.approx((3.2, 3.2), rel=0.02)
    assert BESIROGLU.frontier.exponent == pytest.approx(0.513, abs=0.001)


def test_chinchilla_and_gopher():
    """Gopher's budget, 5.76e23 FLOPs, buys 67 B and 1.5 T by table 3; the refit of approach 3 agrees (Besiroglu)."""
    for name in ("Hoffmann 1", "Hoffmann 2", "Besiroglu"):
        found = BY_NAME[name].of_compute(5.76e23)
        assert 60e9 < found.parameters < 75e9 and 18 < found.tokens_per_parameter < 27
    assert HOFFMANN(70e9, 1.4e12) < HOFFMANN(280e9, 300e9)  # Chinchilla beats Gopher


@pytest.mark.parametrize("compute", [1e19, 1e21, 1e23])
def test_kaplan_s_loss_of_a_budget_is_that_of_its_best_run(compute: float):
    """Eq. 1.3 of half the budget, beside the least that eq. 1.6 has for it at the critical batch: S = 2·S_min steps of
    B_crit(L) tokens, so that C = 12·N·B_crit·S_min (sec. 5 and B.1). Eq. 1.5 would be 0.3 nats lower at 1e21.
    """

    def of_size(N: float) -> float:
        def gap(L: float) -> float:
            return KAPLAN_STEPS(N, compute / (12 * N * KAPLAN_BATCH(L))) - L

        return optimize.brentq(gap, 0.5, 50)

    least = min(of_size(N) for N in np.geomspace(1e6, 1e13, 400))
    kaplan = BY_NAME["Kaplan"]
    best = kaplan.of_compute(compute)
    assert kaplan.best_loss(best) == pytest.approx((3.1e8 * laws.PF_DAY / (compute / 2)) ** 0.050, rel=1e-12)
    assert kaplan.best_loss(best) == pytest.approx(least, rel=0.02)


def test_kaplan_s_laws_agree_where_they_meet():
    """L(N, D) with endless data or an endless model is L(N) or L(D), whose constants the paper fitted apart."""
    assert KAPLAN(1e9, 1e30) == pytest.approx(KAPLAN_SIZE(1e9), rel=0.03)
    assert KAPLAN(1e30, 1e10) == pytest.approx(KAPLAN_DATA(1e10), rel=0.07)
    assert KAPLAN_SIZE.critical == pytest.approx(8.8e13)
