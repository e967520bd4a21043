"""The arithmetic of speed/quality curves, and that the paper's own derived numbers follow from its tables or are noted as not following."""

from typing import Any

import pytest

from texttok_cli.bench import paper
from texttok_cli.bench.curves import Comparison, Point, best, gain, gain_at_equal_time, gains, mean_gain, pareto, speedup_at_equal_fid

SLOW, MIDDLE, FAST, WORSE = Point("slow", 8.0, 2.0), Point("middle", 4.0, 3.0), Point("fast", 1.0, 5.0), Point("worse", 4.0, 4.0)


def test_gains_are_those_that_the_paper_lists() -> None:
    """Sec. 4.3, 256 x 256: 37.2, 25.0, 30.2, 24.2 % in rFID."""
    before, after = (paper.column("table1", "rFID", name, 256) for name in ("Baseline", "TexTok"))
    assert {n: round(value, 1) for n, value in gains(before, after).items()} == {32: 37.2, 64: 25.0, 128: 30.2, 256: 24.2}


def test_mean_gain_takes_the_numbers_of_tokens_that_both_have() -> None:
    assert mean_gain({32: 4.0, 64: 2.0, 128: 9.0}, {32: 2.0, 64: 1.5, 256: 1.0}) == pytest.approx((50 + 25) / 2)
    with pytest.raises(ValueError):
        mean_gain({32: 4.0}, {64: 1.0})


def test_pareto_keeps_what_nothing_beats_in_both() -> None:
    assert pareto([SLOW, WORSE, FAST, MIDDLE]) == [FAST, MIDDLE, SLOW]
    assert pareto([FAST, Point("as good and slower", 2.0, 5.0)]) == [FAST]
    assert pareto([]) == []


def test_speedup_is_by_the_fastest_setting_that_is_no_worse() -> None:
    reference = Point("reference", 12.0, 3.0)
    assert speedup_at_equal_fid([SLOW, MIDDLE, FAST], reference) == Comparison(reference, MIDDLE, 3.0)
    assert speedup_at_equal_fid([FAST], reference) is None


def test_gain_is_by_the_best_setting_that_is_no_slower() -> None:
    reference = Point("reference", 4.0, 4.0)
    found = gain_at_equal_time([SLOW, MIDDLE, FAST], reference)
    assert found == Comparison(reference, MIDDLE, 25.0)
    assert gain_at_equal_time([SLOW], reference) is None


def test_best_is_the_fastest_of_the_best() -> None:
    assert best([SLOW, Point("quick", 1.0, 2.0), FAST]).name == "quick"


def derived() -> dict[str, float]:
    """The paper's derived numbers computed from its tables, by the id of the claim; claims that its tables can't give are not in it."""
    found = {}
    for size in paper.SIZES:
        for letter, metric in (("r", "rFID"), ("g", "gFID")):
            means = [paper.column("table1", metric, system, size) for system in ("Baseline", "TexTok")]
            found[f"{letter}fid-{size}-mean"] = mean_gain(*means)
        found[f"iso-time-gain-{size}"] = gain(paper.fid("DiT-XL/2", size), paper.fid("TexTok-256 + DiT-XL", size))
    for name, size, tokens in (("equal-steps", 512, 32), ("equal-steps", 256, 64), ("less-time", 512, 256)):
        [reference] = paper.column("table5", "generation", paper.SD_VAE, size).values()
        found[f"{name}-{size}-{tokens}"] = reference / paper.column("table5", "generation", "TexTok", size)[tokens]
    return found


@pytest.mark.parametrize("claim", paper.paper()["claims"], ids=lambda claim: claim["id"])
def test_a_claim_follows_from_the_tables_exactly_if_it_is_noted_so(claim: dict[str, Any]) -> None:
    """To a unit of the last digit (the paper averages rounded numbers); what its tables can't give must be noted as not following."""
    found = derived().get(str(claim["id"]))
    assert (found is not None and abs(found - claim["says"]) < 0.1) == claim["follows"], found
    assert claim["note"]


def test_the_numbers_that_the_paper_gets_wrong_are_what_its_tables_give() -> None:
    numbers = derived()
    assert numbers["rfid-512-mean"] == pytest.approx(50.7, abs=0.05)
    assert numbers["gfid-256-mean"] == pytest.approx(15.7, abs=0.05)
    assert numbers["iso-time-gain-256"] == pytest.approx(35.7, abs=0.05)
    # The 48.1 % comes out if the numbers of 256 x 256 stand in for 128 and 256 tokens.
    large, small = ([paper.column("table1", "rFID", name, size) for name in ("Baseline", "TexTok")] for size in (512, 256))
    mixed = [gains(*large)[32], gains(*large)[64], gains(*small)[128], gains(*small)[256]]
    assert sum(mixed) / 4 == pytest.approx(48.1, abs=0.05)


def test_fewer_tokens_gain_more_at_512_px_alone() -> None:
    for size, falls in ((256, False), (512, True)):
        for metric in ("rFID", "gFID"):
            found = list(gains(*(paper.column("table1", metric, name, size) for name in ("Baseline", "TexTok"))).values())
            assert (found == sorted(found, reverse=True)) == falls, (size, metric)
    assert any("30.2 against 25.0 %" in said and "13.8 against 12.7 %" in said for said in paper.paper()["inconsistencies"])


def test_the_tables_hold_every_row() -> None:
    whole = paper.paper()
    for table, width in (("table1", 8), ("table5", 3)):
        for size in ("256", "512"):
            assert {name: len(rows) for name, rows in whole[table][size].items()} == {"SD-VAE-f8": 1, "Baseline": 4, "TexTok": 4}
            assert all(len(row) == width for rows in whole[table][size].values() for row in rows)
    assert len(whole["table2"]["rows"]) == 27
    assert [len(whole["table3"][name]) for name in ("Baseline", "TexTok")] == [3, 3]
    # Table 4's default row is TexTok-128 of Table 1, and its row without text the Baseline's.
    for name, system in (("none", "Baseline"), ("75-word caption", "TexTok")):
        row = whole["table4"]["a, text conditioning"][name]
        assert row == [paper.column("table1", column, system, 256)[128] for column in ("rFID", "PSNR")]


def test_the_paper_s_points_are_drawn_from_its_tables() -> None:
    found = paper.points(512)
    assert [(p.seconds, p.fid) for p in found["TexTok + DiT-XL"]] == [(0.033, 2.74), (0.072, 1.99), (0.113, 1.80), (0.295, 1.62)]
    [reference] = found["SD-VAE-f8 + DiT-XL/2"]
    speedup = speedup_at_equal_fid(found["TexTok + DiT-XL"], reference)
    assert speedup is not None and round(speedup.value, 1) == 32.7  # at equal steps; 93.5 is over a sweep of steps
    assert gain(reference.fid, best(found["TexTok + DiT-XL"]).fid) == pytest.approx(46.7, abs=0.05)
