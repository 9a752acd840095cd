"""The frame of the benchmarks on toys whose times are given, and the mathematics that answers are compared with."""

import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import flowkernels
from benchmarks import __main__ as command_line
from benchmarks import accuracy, bench_limits, bench_masked_linear, bench_training, machine, peers, plots, rows, table
from benchmarks.autoregressive_problem import OURS, Problem, dense_forward, ours, peer
from benchmarks.case import Call, Case, Competitor, Sweep, Target, Unavailable
from benchmarks.measure import measure_case
from benchmarks.memory import peak_bytes
from benchmarks.timing import measure

CPU = torch.device("cpu")
LIMITS = {"matmul_gmac_s": 50.0, "copy_gb_s": 10.0}
MACHINE = {
    "device": "cpu",
    "cpu": "toy",
    "capability": "none",
    "threads": 2,
    "load_before": 0.0,
    "python": "3",
    "torch": "2",
    "flowkernels": "0",
    "commit": "c",
    "date": "today",
    "malloc": "as it is",
    "quick": True,
}


def timed(name: str, seconds: list[float], **options) -> Competitor:
    """A competitor that says how long it took, in turn; the first is the warm-up's."""

    def build() -> Call:
        times = iter([seconds[0], *seconds])
        return Call(lambda: next(times), self_timed=True)

    return Competitor(name, build, **options)


def answering(name: str, answer: torch.Tensor, exact: torch.Tensor, rows: torch.Tensor | None = None, **options) -> Competitor:
    return Competitor(name, lambda: Call(lambda: answer, lambda: exact, rows), **options)


def rows_of(case: Case) -> dict[str, rows.Row]:
    found = measure_case(case, benchmark="toy", machine=MACHINE, limits=LIMITS, say=lambda _: None)
    return {row["competitor"]: row for row in found}


def test_ratio_is_of_medians_and_its_quartiles_are_of_pairs():
    competitors = [timed("us", [1.0, 2.0, 9.0, 2.0], ours=True), timed("them", [4.0, 6.0, 36.0, 8.0])]
    found = rows_of(Case("toy", competitors, targets=[Target("speedup", 3.0, 4.0, "them")], seconds=1e3, most_rounds=4))
    assert found["us"]["seconds"] == 2.0
    assert found["them"]["seconds"] == 7.0
    assert found["them"]["ratio"] == 3.5
    assert found["us"]["ratio"] == 1.0
    assert (found["them"]["ratio_q1"], found["them"]["ratio_q3"]) == (3.75, 4.0)  # of 4, 3, 4, 4
    assert (found["us"]["seconds_q1"], found["us"]["seconds_q3"]) == (1.75, 3.75)
    (target,) = found["us"]["targets"]
    assert (target["value"], target["verdict"]) == (3.5, "must")


def test_a_slow_competitor_takes_fewer_turns_and_meets_ours_in_the_same_rounds():
    fast, slow = measure([timed("fast", [1.0] * 10).build(), timed("slow", [5.0] * 10).build()], seconds=10.0, most_rounds=10, device=CPU)
    assert (len(fast.seconds), len(slow.seconds)) == (10, 2)
    assert set(slow.rounds) < set(fast.rounds)


def test_a_real_call_is_timed():
    (timing,) = measure([Call(lambda: sum(range(20_000)))], seconds=0.05, most_rounds=5, device=CPU)
    assert 1e-5 < timing.median < 0.1
    assert timing.quartiles[0] <= timing.median <= timing.quartiles[1]


@pytest.mark.parametrize(
    ("figure", "must", "aim", "verdict"),
    [("share", 0.6, 0.4, "must"), ("share", 0.6, 0.5, "aim"), ("share", 0.4, 0.3, "MISSED"), ("seconds", 1.0, None, "must")],
)
def test_verdicts_where_less_is_better(figure, must, aim, verdict):
    competitors = [timed("us", [1.0, 1.0], ours=True), timed("them", [2.0, 2.0])]
    case = Case("toy", competitors, targets=[Target(figure, must, aim, "them")], seconds=1.0, most_rounds=2)
    assert rows_of(case)["us"]["targets"][0]["verdict"] == verdict


def test_memory_share_is_of_the_peaks(monkeypatch):
    peaks = {"us": 30, "them": 60}
    monkeypatch.setattr("benchmarks.measure.measure_in_process", lambda benchmark, case, competitor, **_: peaks[competitor])
    competitors = [timed(name, [1.0], ours=name == "us", memory=True) for name in peaks]
    case = Case("toy", competitors, targets=[Target("memory share", 0.6, 0.4, "them")], timed=False)
    found = rows_of(case)
    (target,) = found["us"]["targets"]
    assert (target["value"], target["verdict"]) == (0.5, "must")
    assert "memory, ours / them: 0.5" in table.render_case(list(found.values()))


def test_rate_is_against_the_matmul_of_the_same_case():
    case = Case("toy", [timed("us", [0.5, 0.5], ours=True)], macs=1e9, targets=[Target("rate", 1e-9)], seconds=0.01, most_rounds=2)
    row = rows_of(case)["us"]
    assert row["gmac_s"] == 2.0
    assert row["matmul_gmac_s"] != LIMITS["matmul_gmac_s"]
    assert row["targets"][0]["value"] == pytest.approx(2.0 / row["matmul_gmac_s"])


@pytest.mark.parametrize("bad", ["far", "nan outside the checked rows"])
def test_a_wrong_answer_is_never_fast(bad):
    exact = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    wrong = exact.float().clone()
    wrong[0 if bad == "far" else 3, 1] = 9.0 if bad == "far" else torch.nan
    checked = torch.arange(3)
    competitors = [
        answering("us", exact.float(), exact[:3], checked, ours=True),
        answering("them", wrong, exact[:3], checked),
        answering("others", exact.float(), exact[:3], checked),
    ]
    targets = [Target("speedup", 0.0, 0.0, "them"), Target("speedup", 0.0, 0.0, "others")]
    found = rows_of(Case("toy", competitors, macs=1.0, targets=targets, seconds=0.01, most_rounds=2, sweep=Sweep("s", "x", 1.0)))
    assert [found[name]["wrong"] for name in ("us", "them", "others")] == [False, True, False]
    assert found["us"]["error_max"] < 1e-6
    assert "ratio" not in found["them"]
    assert "share_of_limit" not in found["them"]
    assert [target["verdict"] for target in found["us"]["targets"]] == ["not measured", "aim"]
    line = next(line for line in table.render_case(list(found.values())).splitlines() if line.strip().startswith("them"))
    assert "WRONG" in line
    assert not any(unit in line for unit in ("us", "ms"))


def test_nobody_is_ranked_against_ours_when_ours_is_wrong():
    exact = torch.ones(2, 2, dtype=torch.float64)
    competitors = [answering("us", torch.zeros(2, 2), exact, ours=True), answering("them", exact.float(), exact)]
    found = rows_of(Case("toy", competitors, targets=[Target("seconds", 1e9)], seconds=0.01, most_rounds=2))
    assert "ratio" not in found["them"]
    assert found["us"]["targets"][0]["verdict"] == "wrong"


def test_who_cannot_run_is_left_out_and_named():
    def build() -> Call:
        raise Unavailable("not installed")

    said: list[str] = []
    case = Case("toy", [timed("us", [1.0, 1.0], ours=True), Competitor("them", build)], seconds=1.0, most_rounds=2)
    found = measure_case(case, benchmark="toy", machine=MACHINE, limits=LIMITS, say=said.append)
    assert [row["competitor"] for row in found] == ["us"]
    assert said == ["toy: them left out: not installed"]


def test_rows_replace_those_of_the_same_benchmark_and_device(tmp_path):
    path = tmp_path / "deep" / "rows.jsonl"
    for benchmark, device, value in [("a", "cpu", 1), ("b", "cpu", 2), ("a", "gpu", 3), ("a", "cpu", 4)]:
        rows.replace(path, [{"benchmark": benchmark, "device": device, "value": value}], benchmark=benchmark, device=device)
    assert [row["value"] for row in rows.read(path)] == [2, 3, 4]
    assert len(list(path.parent.iterdir())) == 1


def test_command_line_measures_keeps_shows_and_draws(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")

    def cases(quick: bool, device: torch.device) -> list[Case]:
        return [
            Case(
                f"time, D={d}, H=4x2",
                [timed(OURS, [1e-3 * d] * 2, ours=True), timed("nflows", [1e-3 * d**2] * 2)],
                targets=[Target("speedup", 3.0, 30.0, "nflows")],
                seconds=1e-9,
                most_rounds=2,
                sweep=Sweep("time", "features D", d),
            )
            for d in (4, 8, 16)
        ]

    monkeypatch.setitem(sys.modules, "benchmarks.bench_toy", SimpleNamespace(cases=cases))
    monkeypatch.setattr(command_line, "names", lambda: ["toy"])
    monkeypatch.setattr(machine, "measure_limits", lambda device: LIMITS)
    monkeypatch.setattr(machine, "raise_malloc_thresholds", lambda: "as it is")
    out = tmp_path / "rows.jsonl"
    assert command_line.main(["toy", "--out", str(out), "--plot"]) == 0
    kept = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(kept) == 6
    assert {"benchmark", "case", "competitor", "seconds", "seconds_q1", "torch", "commit", "date", "cpu"} <= kept[0].keys()
    assert (tmp_path / "rows-time.png").stat().st_size > 10_000

    capsys.readouterr()
    assert command_line.main(["--show", "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "nflows / ours: 16  (must 3, aim 30)  must" in shown
    with pytest.raises(SystemExit):
        command_line.main(["nothing"])
    assert "no benchmark named nothing; there are toy" in capsys.readouterr().err


def test_limits_are_measured_and_rates_shown(monkeypatch):
    cases = bench_limits.cases(True, CPU)
    assert [case.name.split()[0] for case in cases] == ["matmul", "copy,", "copy,"]
    (row,) = rows_of(replace(cases[1], seconds=0.01, most_rounds=2)).values()
    assert f"{8e6 / row['seconds'] / 1e9:,.1f} GB/s" in bench_limits.summary([row])


def test_the_time_of_a_competitor_is_limited(tmp_path, monkeypatch, capsys):
    cases = [Case("toy", [timed("us", [1.0] * 9, ours=True)], seconds=9.0)]
    monkeypatch.setitem(sys.modules, "benchmarks.bench_toy", SimpleNamespace(cases=lambda quick, device: cases))
    monkeypatch.setattr(command_line, "names", lambda: ["toy"])
    monkeypatch.setattr(machine, "measure_limits", lambda device: LIMITS)
    for seconds, turns in (("3", 3), ("100", 9)):
        assert command_line.main(["toy", "--seconds", seconds, "--out", str(tmp_path / "rows.jsonl")]) == 0
        assert [row["turns"] for row in rows.read(tmp_path / "rows.jsonl")] == [turns]


def test_each_of_several_benchmarks_runs_in_a_process_of_its_own(tmp_path, monkeypatch):
    commands, statuses = [], iter((1, 0))

    def run(command, check):
        commands.append(command)
        return SimpleNamespace(returncode=next(statuses))

    monkeypatch.setattr(command_line.subprocess, "run", run)
    out = tmp_path / "rows.jsonl"
    rows.replace(out, [{"benchmark": "lu", "device": "cpu", "case": "old"}], benchmark="lu", device="cpu")
    assert command_line.main(["lu", "limits", "--quick", "--seconds", "0.5", "--out", str(out)]) == 1  # the first failed; the second ran
    options = ["--out", str(out), "--device", "cpu", "--quick", "--seconds", "0.5"]
    assert commands == [[sys.executable, "-m", "benchmarks", name, *options] for name in ("lu", "limits")]


def test_an_interrupted_run_leaves_the_results_as_they_were(tmp_path, monkeypatch):
    def interrupted() -> Call:
        raise KeyboardInterrupt

    good = Case("good", [timed("us", [1.0] * 2, ours=True)], seconds=1.0, most_rounds=2)
    cases = [good, Case("bad", [Competitor("us", interrupted, ours=True)])]
    monkeypatch.setitem(sys.modules, "benchmarks.bench_toy", SimpleNamespace(cases=lambda quick, device: cases))
    monkeypatch.setattr(command_line, "names", lambda: ["toy"])
    monkeypatch.setattr(machine, "measure_limits", lambda device: LIMITS)
    monkeypatch.setattr(machine, "raise_malloc_thresholds", lambda: "as it is")
    out = tmp_path / "rows.jsonl"
    old = {"benchmark": "toy", "device": "cpu", "case": "old"}
    rows.replace(out, [old], benchmark="toy", device="cpu")
    with pytest.raises(KeyboardInterrupt):
        command_line.main(["toy", "--out", str(out)])
    assert rows.read(out) == [old]
    assert [row["case"] for row in rows.read(tmp_path / "rows.jsonl.unfinished")] == ["good"]


def test_slope_is_the_exponent():
    assert plots.slope([1, 2, 4], [3, 3 * 2**1.5, 3 * 4**1.5]) == pytest.approx(1.5)


def test_peak_memory_sees_a_temporary_and_not_the_outputs():
    if not sys.platform.startswith("linux"):
        pytest.skip("the high-water mark is Linux's")
    quarter = 4 * 2**20  # floats: 16 MB

    def run() -> torch.Tensor:
        temporary = torch.ones(4 * quarter)
        return temporary[:quarter] + 1.0

    peak = peak_bytes(Call(run), CPU)
    if peak is None:
        pytest.skip("/proc/self/clear_refs cannot be written here")
    assert 60 * 2**20 < peak < 80 * 2**20


@pytest.fixture(params=[0, 3], ids=["plain", "context"])
def problem(request) -> Problem:
    return Problem(5, (12, 12), 9, CPU, context_features=request.param, check_rows=4)


def test_exact_answers_are_those_of_the_d_pass_loop(problem):
    layer = problem.layer.double()
    try:
        for direction, exact in (("inverse", problem.exact_inverse), ("forward", problem.exact_forward)):
            with flowkernels.backend("reference"), torch.no_grad():
                context = None if problem.context is None else problem.context.double()
                wanted = getattr(layer, direction)(problem.input.double(), context)
            for got, want in zip(exact, wanted, strict=True):
                torch.testing.assert_close(got, want[problem.rows])
    finally:
        layer.float()


def test_multiply_adds_are_the_ones_of_the_masks():
    problem = Problem(5, (12, 12), 9, CPU)
    count = sum(int((part.weight != 0).sum()) for part in problem.dense() if isinstance(part, torch.nn.Linear))
    assert problem.macs == 9 * count


@pytest.mark.parametrize("name", ["flowkernels", "nflows", "zuko", "pyro"])
def test_training_steps_have_the_gradients_of_float64(name):
    if name != OURS:
        pytest.importorskip(name)
    problem = Problem(5, (12, 12), 9, CPU)
    single = bench_training._ours(problem) if name == OURS else bench_training._peer(name, problem)
    competitors = {"layer": single}
    if name != OURS:
        build = lambda: peers.build_stack(name, 5, (12, 12), 3)
        competitors["stack"] = bench_training._competitor(
            name, build, lambda m, x: bench_training._nll_of(name, m, x), problem.input, package=name
        )
    for competitor in competitors.values():
        call = competitor.build()
        before = accuracy.check(call)
        assert not before.wrong and before.rms > 0
        assert len(call.run()) > 6, "the gradients are compared too"


def test_masked_linear_cases_agree_with_float64(monkeypatch):
    monkeypatch.setattr(bench_masked_linear, "SIZES", ((20, 9),))
    for case in bench_masked_linear.cases(True, CPU):
        assert len(case.competitors) == (2 if case.name.startswith("dx") else 3)
        assert not any(accuracy.check(competitor.build()).wrong for competitor in case.competitors)


@pytest.mark.parametrize("library", peers.LIBRARIES)
def test_peers_have_our_depth_and_their_exact_copies_agree(library):
    pytest.importorskip(library)
    problem = Problem(5, (12, 12), 9, CPU)
    competitors = [ours(problem, "inverse"), dense_forward(problem), peer(library, problem, "inverse")]
    found = rows_of(Case("toy", competitors, seconds=0.01, most_rounds=2))
    assert not any(row["wrong"] for row in found.values())
    assert found[library]["package_version"]
    assert 1e-9 < found[library]["error_rms"] < 1e-5
