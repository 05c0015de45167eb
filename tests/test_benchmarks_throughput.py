"""The benchmark of samples per hour and the comparison of answers side by side: their arithmetic, without a model."""

import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from lm_eval_sparse.errors import UserError
from lm_eval_sparse.protocol import MeasuredLoglikelihood

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
throughput = importlib.import_module("throughput")
side_by_side = importlib.import_module("side_by_side")


def sample(task, index, requests):
    return throughput.Sample(task, index, tuple((task, index, number) for number in range(requests)))


def samples():
    """Three leaves of five documents, of 4, 40 and 1 requests."""
    return [sample(task, index, many) for task, many in (("a", 4), ("b", 40), ("c", 1)) for index in range(5)]


# --- calls and rates -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 4, 16])
def test_calls_hold_each_sample_once(batch):
    everything = {(one.task, one.index) for one in samples()}
    twins = throughput.calls_of(samples(), throughput.TWINS, batch)
    for calls in (twins, throughput.calls_of(samples(), throughput.GENERATED, batch)):
        found = [(one.task, one.index) for call in calls for one in call]
        assert len(found) == len(everything) and set(found) == everything
    # Scored: the leaves take turns, and no call but the last has fewer than four batches of requests.
    assert [one.index for call in twins for one in call] == sorted([*range(5)] * 3)
    assert all(sum(len(one.requests) for one in call) >= 4 * batch for call in twins[:-1])
    # Generated: full batches of documents that follow each other, and not in their order.
    generated = throughput.calls_of(samples(), throughput.GENERATED, batch)
    assert sorted(map(len, generated))[1:] == [batch] * (len(generated) - 1) or len(generated) == 1
    if batch == 1:
        assert len({call[0].task for call in generated[:5]}) == 3


def test_a_row_ends_with_the_call_under_way():
    now = 0.0

    def answer(call):
        nonlocal now
        now += 10.0
        return iter([(one, [0] * len(one.requests)) for one in call])

    calls = throughput.calls_of(samples(), throughput.TWINS, 4)
    row, answers = throughput.timed(calls, answer, seconds=15, clock=lambda: now)
    assert (row["seconds"], row["cut"]) == (20.0, True) and len(answers) == len(calls[0]) + len(calls[1])
    assert (row["of_documents"], row["of_requests"]) == (15, 5 * 45)
    assert row["requests"] == sum(len(one.requests) for one, _ in answers) and row["documents"] == len(answers)
    now = 0.0
    row, answers = throughput.timed(calls, answer, seconds=1e9, clock=lambda: now)
    assert not row["cut"] and row["documents"] == 15 and row["seconds"] == 10.0 * len(calls)


def row(name, kind="twins", length="4k", **changes):
    base = {
        "name": name, "kind": kind, "length": length, "digest": kind, "skipped": {"squad": "no data"}, "cut": False,
        "documents": 140, "of_documents": 140, "requests": 2100, "of_requests": 2100, "seconds": 70.0,
        "stopped_after": 20.0, "peak_bytes": 2**31, "scores": {"niah": {"exact": 0.5}, "vt": {"iou": 1.0}},
        "sparsities": {"sparsity": 0.9},
    }  # fmt: skip
    made = {**base, **changes}
    return made if "failed" in made else made | {"samples_per_hour": throughput.samples_per_hour(made)}


def test_rates_of_what_was_done():
    assert row("dense")["samples_per_hour"] == pytest.approx(7200)
    cut = {"cut": True, "documents": 1, "requests": 210, "seconds": 14.0}
    # A tenth of the requests, so what 14 of 140 documents cost hf; ours reads a document once.
    assert row("hf/4", **cut)["samples_per_hour"] == pytest.approx(3600)
    assert row("dense", **cut)["samples_per_hour"] == pytest.approx(3600 / 14)
    assert row("hf/4", "generated", **cut)["samples_per_hour"] == pytest.approx(3600 / 14)


def test_a_table_from_rows(tmp_path, capsys):
    rows = [
        row("hf/1", seconds=700.0), row("hf/16", failed="out of memory"), row("hf/4", seconds=630.0), row("dense"),
        row("quest", cut=True, documents=70),
        row("hf/8", "generated", "16k", documents=14, seconds=70.0, tokens=1400, cut=True), row("dense", length="16k"),
    ]  # fmt: skip
    for one in rows:
        throughput.write(throughput.path_of(tmp_path, one["length"], one["kind"], one["name"]), json.dumps(one))
    about = {"device": {"name": "a card"}, "versions": {"torch": "2", "cuda": None}, "dtype": "bfloat16", "chat": True}
    throughput.check_same(tmp_path, about)
    output = tmp_path / "out" / "throughput.json"
    assert throughput.main(["table", str(tmp_path), "--output", str(output)]) == 0
    content = json.loads(output.read_text())
    assert [one["name"] for one in content["rows"]][:5] == ["hf/1", "hf/4", "hf/16", "dense", "quest"]
    ratios = {(one["length"], one["kind"], one["name"]): one.get("over_hf") for one in content["rows"]}
    assert ratios["4k", "twins", "dense"] == pytest.approx(9) and ratios["4k", "twins", "hf/4"] == 1
    assert ratios["4k", "twins", "hf/16"] is None is ratios["16k", "twins", "dense"]  # no hf with those requests
    assert [(one["length"], one["hf"], one["reached"]) for one in content["targets"]] == [
        ("4k", "hf/4", True), ("16k", "hf/8", True)
    ]  # fmt: skip
    assert content["targets"][1]["ratio"] == pytest.approx(10)
    text = output.with_suffix(".md").read_text()
    assert "a card" in text and "torch 2" in text and "cuda" not in text and "Not run: squad (no data)" in text
    assert "| quest | 3600 | 4.50 | 70 of 140* | 30.0 | - | 2.0 | 0.900 | 0.750 |" in text
    assert "out of memory" in text and "dense twins have 9.0 times" in text
    # Rows of other requests, or of another device, are not put together.
    with pytest.raises(UserError, match="different requests"):
        throughput.compared([*rows, row("snapkv", digest="other")])
    with pytest.raises(UserError, match="are of device a card, this run is of another"):
        throughput.check_same(tmp_path, {**about, "device": {"name": "another"}})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--names", "dnse"], "--names dnse is not known"),
        (["--names", "hf/0"], "--names hf/0 is not known"),
        (["--lengths", "5k"], "length '5k' is not known"),
        (["--lengths", "4k=x"], "give documents as in 4k=20"),
        (["--kinds", "scored"], "--kinds scored is not known"),
        (["--seconds", "nan"], "take numbers above 0"),
        (["--hf_seconds", "-1"], "take numbers above 0"),
    ],
)
def test_bad_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit) as ended:
        throughput.main(["run", "--model", "m", "--rows", "r", *arguments])
    assert ended.value.code == 2 and message in capsys.readouterr().err


def test_rows_that_are_there_are_not_measured_again(tmp_path, capsys):
    (tmp_path / "4k_twins_hf-8.json").write_text("{}")
    arguments = ["run", "--model", "none", "--rows", str(tmp_path), "--names", "hf/8", "--lengths", "4k"]
    assert throughput.main([*arguments, "--kinds", "twins"]) == 0 and "all rows are there" in capsys.readouterr().out


# --- side by side --------------------------------------------------------------------------------------------------


def answer(logprob, greedy=True, prefill=0.8, decode=0.5):
    figures = {"executed_sparsity": decode, "selected_sparsity": decode, "bytes_read_fraction": None}
    stats = {"prefill": {"executed_sparsity": prefill}, "eviction": {}, "decode": figures, "sparsity": prefill}
    return MeasuredLoglikelihood(logprob, greedy, stats)


def compared(together, alone, most=None):
    """A row of one document; `alone` is what each request has by itself."""

    def loglikelihood(requests, disable_tqdm):
        return together if len(requests) > 1 else [alone[requests[0][2]]]

    lm = SimpleNamespace(loglikelihood=loglikelihood)
    found = side_by_side.compare(lm, [sample("a", 0, len(together))], most, 1e9)
    return {**found, "dtype": "bfloat16", "device": "cpu", "task": "niah", "method": "dense", "length": "4k"}


def test_any_difference_is_seen():
    same = [answer(-1.5), answer(-2.5, False), answer(-0.25)]
    good = compared(same, same)
    assert (good["equal"], good["alone"], good["largest"]) == (3, 3, 0) and side_by_side.status([good]) == 0
    for other, figure, value in (
        (answer(-0.25 - 2**-50), "largest", 2**-50),
        (answer(float("nan")), "largest", float("inf")),
        (answer(-0.25, False), "flags", 1),
        (answer(-0.25, prefill=0.7), "other_figures", 1),
        (answer(-0.25, decode=0.4), "other_figures", 0),  # between those of the others
    ):
        found = compared(same, [*same[:2], other])
        assert found[figure] == value
        assert side_by_side.status([good, found]) == (1 if value else 0)
    assert side_by_side.status([compared([answer(-1.0)] * 3, [answer(-1.0, decode=0.6)] * 3)]) == 1
    # Single precision on a CPU is allowed its rounding.
    near = {**compared(same, [*same[:2], answer(-0.25 - 1e-5)]), "dtype": "float32"}
    assert side_by_side.status([near]) == 0 and side_by_side.status([{**near, "device": "cuda"}]) == 1
    assert side_by_side.status([]) == side_by_side.status([{"failed": "x"}, good]) == 2


def test_some_requests_alone():
    many = sample("a", 3, 40)
    assert side_by_side.places(many, None) == [*range(40)] == side_by_side.places(many, 50)
    found = side_by_side.places(many, 4)
    assert len(set(found)) == 4 and {0, 39} <= set(found) and found == side_by_side.places(many, 4)
    assert side_by_side.places(many, 1) == [0]


def test_methods_of_several_phases():
    assert side_by_side.typed("dense") == {"method": "dense"}
    assert side_by_side.typed("twilight:quest") == {"method": "twilight:quest", "decode_sparsity": 0.8}
    assert side_by_side.typed("vertical_slash+snapkv+quest") == {
        "method": "vertical_slash+snapkv+quest", "prefill_sparsity": 0.8, "kv_sparsity": 0.5, "decode_sparsity": 0.8,
    }  # fmt: skip
    from lm_eval_sparse.methods import METHODS

    ours = {part for name in side_by_side.METHODS for part in name.replace(":", "+").split("+")}
    assert ours == set(METHODS)  # every method of the package


def test_a_table_of_comparisons(tmp_path):
    same = [answer(-1.5), answer(-2.5)]
    rows = [compared(same, same), compared(same, [same[0], answer(-2.0)]) | {"method": "quest"}]
    for one in rows:
        place = side_by_side.path_of(tmp_path, one["dtype"], one["method"], one["task"], one["length"])
        side_by_side.write(place, json.dumps(one))
    (tmp_path / "about.json").write_text(json.dumps({"device": "x", "versions": {"torch": "2"}}))
    output = tmp_path / "side.json"
    assert side_by_side.main(["table", str(tmp_path), "--output", str(output)]) == 1
    text = output.with_suffix(".md").read_text()
    assert (
        "| `dense` | 2 of 2 |" in text and "| `quest` | **1 of 2** (0.5) |" in text and "; 1 of those differed" in text
    )
