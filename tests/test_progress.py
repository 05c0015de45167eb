"""Progress of a call, the summary of a run, and where kernels are kept: on a fake clock, and with tiny models.

The oracle of speeds and times left is a closed form, worked out by hand from seconds that the test lets go by.
"""

from __future__ import annotations

import fcntl
import io
import json
import os
import random
import re
import struct
import tempfile
import termios
from pathlib import Path
from typing import Any

import pytest
import tiny
from small_lms import PROMPTS, request

from lm_eval_sparse.errors import UserError
from lm_eval_sparse.model import checks, progress, summary
from lm_eval_sparse.model.lm import SparseHFLM
from lm_eval_sparse.model.progress import Call, Clock
from lm_eval_sparse.protocol import MeasuredText


class Time:
    """Seconds that go by when the test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    """A stream that takes control characters."""

    def isatty(self) -> bool:
        return True


def call_of(total: int, quiet: bool = False, stream: Any = None) -> tuple[Time, Clock, Call]:
    time = Time()
    clock = Clock(time)
    return time, clock, Call(clock, "generate_until", total, quiet, stream or io.StringIO())


def test_speed_share_and_time_left_are_the_closed_form() -> None:
    """Four prompts with answers of at most 11 tokens: 0.01 s a prompt token, 0.5 s a step of two rows."""
    rng = random.Random()
    lengths = sorted((rng.randint(50, 500) for _ in range(4)), reverse=True)
    time, clock, call = call_of(4)
    call.expect({index: (length, 10) for index, length in enumerate(lengths)})
    assert (call.share(), call.speed(), call.left()) == (0.0, None, None)

    def read(length: int) -> None:
        clock.switch("prefill", length)
        time.now += 0.01 * length

    read(lengths[0])
    assert clock.tokens["prefill"] == 0  # it still runs
    read(lengths[1])
    clock.switch("decode")
    assert clock.tokens["prefill"] == lengths[0] + lengths[1] and call.speed() == pytest.approx(100)
    assert call.left() is None  # nothing is known yet of what a step takes
    assert call.share() == pytest.approx((lengths[0] + lengths[1]) / (sum(lengths) + progress.WEIGHT * 40))
    total = sum(lengths) + 25 * 40  # as long as 25 tokens of prompts takes one of an answer
    for step in range(5):
        time.now += 0.5
        clock.landed(2)
        clock.settle()
        assert call.share() == pytest.approx((lengths[0] + lengths[1] + 25 * (2 * step + 2)) / total)
    # Each of the 30 tokens that are left, if answers get as long as they may, takes 0.25 s.
    assert call.left() == pytest.approx(0.01 * (lengths[2] + lengths[3]) + 0.25 * 30)
    before = call.share()
    call.answered(0, MeasuredText("a"))
    assert before <= call.share()
    call.answered(1, MeasuredText("b"))
    # They ended at half of their limits, so the others are taken to do so.
    assert call.left() == pytest.approx(0.01 * (lengths[2] + lengths[3]) + 0.25 * 10)
    assert call.share() == pytest.approx((lengths[0] + lengths[1] + 25 * 20) / total)
    seconds = 0.01 * (lengths[0] + lengths[1]) + 2.5
    assert call.speed() == pytest.approx((lengths[0] + lengths[1] + 10) / seconds)
    time.now += 7  # neither reads tokens
    clock.settle()
    assert clock.seconds["rest"] == pytest.approx(7) and sum(clock.seconds.values()) == pytest.approx(time.now)


def test_what_ran_in_vain_counts_once() -> None:
    """Batches that memory ran out in run again: the share stays below 1 until all is answered, and never falls."""
    time, clock, call = call_of(2)
    call.expect({0: (100, 0), 1: (100, 0)})
    shares = []
    for _ in range(3):
        clock.switch("prefill", 100)
        time.now += 1
        clock.switch("rest")
        shares.append(call.share())
    call.answered(0)
    shares.append(call.share())
    call.answered(1)
    assert shares == sorted(shares) and shares[0] == 0.5 and call.share() == 1


def test_checks_count_no_token() -> None:
    time, clock, call = call_of(1)
    clock.switch("prompts")
    with clock.checking():
        clock.switch("prefill", 37)
        time.now += 2
    time.now += 1
    clock.settle()
    assert clock.tokens == {"prefill": 0, "decode": 0}
    assert (clock.seconds["checks"], clock.seconds["prompts"]) == (2, 1)


def test_samples_are_documents_and_prompts_weigh_the_same() -> None:
    """Two requests share a prompt and its figures: the mean is over prompts."""
    _, _, call = call_of(3)
    call.documents([("t", 0), ("t", 0), ("t", 1)])
    first, second = {"sparsity": 0.5}, {"sparsities": {"sparsity": 0.9, "kv_sparsity": None}}
    call.answered(0, MeasuredText("", first))
    assert call.text().startswith("0/2 samples [00:00<?, ? tokens/s, sparsity 0.50")
    call.answered(1, MeasuredText("", first))
    call.answered(2, MeasuredText("", second))
    assert call.text().startswith("2/2 samples") and "sparsity 0.70]" in call.text()
    assert call.clock.samples == 2 and call.share() == 1


def test_a_terminal_gets_one_bar_at_most_four_times_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "WEIGHT", 1.0)
    stream = Terminal()
    time, clock, call = call_of(1, stream=stream)
    call.expect({0: (100, 640)})
    clock.switch("prefill", 100)
    time.now += 1
    clock.switch("decode")
    for _ in range(640):
        time.now += 1 / 64
        clock.landed(1)
    call.answered(0)
    call.close()
    drawn = [line for line in re.split(r"[\r\n]", stream.getvalue()) if "samples" in line]
    assert 35 <= len(drawn) <= 11 * 4 + 3 and "\x1b[3" not in stream.getvalue()
    shares = [int(re.search(r"(\d+)%\|", line)[1]) for line in drawn]
    assert shares == sorted(shares) and len(set(shares)) > 35 and shares[-1] == 100
    assert "1/1 samples [00:11<00:00, 67 tokens/s]" in drawn[-1]  # 740 in 11 s
    assert stream.getvalue().count("\n") == 1


def test_a_file_gets_a_few_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    time, clock, call = call_of(1, stream=stream)
    call.expect({0: (0, 6400)})
    clock.switch("decode")
    for _ in range(6400):
        time.now += 1 / 64
        clock.landed(1)
    call.close()
    lines = stream.getvalue().splitlines()
    # After 3 s, then every 30, and the end.
    assert len(lines) == 5 and not set("\r\x1b") & set(stream.getvalue())
    assert lines[0] == "generate_until:   3% 0/1 samples [00:03<01:37, 64 tokens/s]"
    monkeypatch.setenv("TQDM_DISABLE", "1")
    silent = io.StringIO()
    call_of(1, stream=silent)[2].close()
    assert silent.getvalue() == ""


def test_a_terminal_without_a_size_gets_lines() -> None:
    master, slave = os.openpty()  # as a container's may be: no rows, no columns
    with open(slave, "w") as stream, open(master, "rb"):
        assert stream.isatty() and not progress.is_terminal(stream)
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
        assert progress.is_terminal(stream)


def test_quiet_shows_nothing() -> None:
    for stream in (io.StringIO(), Terminal()):
        time, clock, call = call_of(1, quiet=True, stream=stream)
        clock.switch("prefill", 10)
        time.now += 100
        call.answered(0)
        call.close()
        assert stream.getvalue() == "" and not clock.shown and clock.samples == 1


@pytest.fixture(scope="module")
def lm() -> SparseHFLM:
    return SparseHFLM(
        pretrained=tiny.family("llama"), tokenizer=tiny.tiny_tokenizer(), method="snapkv+quest", kv_sparsity=0.5,
        decode_sparsity=0.8, device="cpu",
    )  # fmt: skip


def test_a_generated_task_moves_before_its_first_answer(
    lm: SparseHFLM, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Without a terminal, with every tick a line: prompts and single tokens move it; the last line is the whole."""
    monkeypatch.setattr(progress.Lines, "first", 0.0)
    monkeypatch.setattr(progress.Lines, "every", 0.0)
    before = dict(lm.clock.tokens)
    texts = lm.generate_until([request("generate_until", PROMPTS[1], {"until": [], "max_gen_toks": 9})])
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("generate_until")]
    shares = [float(re.search(r"(\d+)%", line)[1]) for line in lines if "reading" not in line]
    early = [share for share, line in zip(shares, lines[-len(shares) :], strict=True) if " 0/1 samples" in line]
    prompt = len(lm.tok_encode(PROMPTS[1]))
    assert len(early) >= 8 and len(set(early)) >= 4 and shares == sorted(shares)
    assert round(100 * prompt / (prompt + 8 * progress.WEIGHT)) in early  # the prompt is read, no token has arrived
    assert lines[-1].startswith("generate_until: 100% 1/1 samples") and ", sparsity kv 0." in lines[-1]
    assert len(texts) == 1 and lm.clock.tokens["decode"] - before["decode"] == 8
    assert lm.clock.tokens["prefill"] - before["prefill"] == prompt


def test_scored_requests_leave_one_bar_and_their_summary_in_the_results(
    lm: SparseHFLM, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    clock, lm.clock.shown = lm.clock, False
    before = dict(clock.tokens)
    pairs = [(PROMPTS[0], " river stone"), (PROMPTS[0], " apple"), (PROMPTS[2], " river stone cloud")]
    lm.loglikelihood([request("loglikelihood", *pair) for pair in pairs], disable_tqdm=True)
    lm.get_model_info()
    assert capsys.readouterr().err == "" and not clock.shown
    lm.loglikelihood([request("loglikelihood", *pair) for pair in pairs])
    report = lm.get_model_info()["sparse"]
    err = capsys.readouterr().err
    assert err.count("loglikelihood: ") == 1 and "Tokenizing" not in err and "\r" not in err
    run = report["run"]
    prompts = {context: len(lm._encode_pair(context, answer)[0]) for context, answer in pairs}
    assert clock.tokens["prefill"] - before["prefill"] == 2 * sum(prompts.values())
    assert run["tokens"] == clock.tokens and run["samples"] >= 2
    assert run["seconds"]["total"] == pytest.approx(sum(run["seconds"][phase] for phase in progress.PHASES), abs=0.01)
    assert all(run["seconds"][phase] > 0 for phase in ("loading", "checks", "prompts", "prefill", "decode"))
    assert run["peak_memory_bytes"]["seen"] > 1 << 20 and run["peak_memory_bytes"]["predicted"] > 1 << 20
    json.dumps(run)
    assert f"Run of {run['seconds']['total']:.1f} s: " in err and "peak memory: " in err


def test_an_estimate_that_cannot_be_made_is_left_out(lm: SparseHFLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(lm.decoding.memory), "row", lambda *args: 1 / 0)
    fresh = summary.Summary(lm)
    fresh.begin()
    fresh.expect([100], 10)
    memory = fresh.figures()["peak_memory_bytes"]
    assert memory["predicted"] is None and memory["seen"] > 0


def test_the_summary_names_what_did_not_run_as_asked() -> None:
    run = {
        "seconds": {**dict.fromkeys(progress.PHASES, 0.0), "prefill": 12.34, "total": 12.34},
        "tokens": {"prefill": 123_400, "decode": 0},
        "tokens_per_second": {"prefill": 10_000.0, "decode": None},
        "samples": 3,
        "peak_memory_bytes": {"predicted": None, "seen": 3 << 29},
    }
    calls = {"sparse": 30, "dense": 0, "fallback": 0}
    phases = {
        "prefill": {"calls": calls},
        "decode": {"calls": {**calls, "fallback": 10}, "fallback_reasons": {"too short\x1b[31m": 10}},
    }
    skipped = {f"frontier_{n}_128k": "the model is too short" for n in range(20)}
    found = summary.text({"run": run, "phases": phases, "skipped": skipped, "batches_halved": 2})
    assert found.splitlines()[:3] == [
        "Run of 12.3 s: prefill 12.3",
        "  3 samples, 123,400 tokens in prefill (10,000.0/s)",
        "  peak memory: 1.50 GiB seen",
    ]
    assert "  decode: 10 of 40 calls fell back to dense (10: too short" in found and "\x1b" not in found
    assert "prefill:" not in found and "memory ran out 2 times" in found
    assert "frontier_7_128k and 12 more: the model is too short" in found


def test_kernels_are_kept_where_that_can_be_done(tmp_path: Any, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    """A home that is a file cannot hold them: a folder of this process does, with one warning."""
    monkeypatch.setenv("TRITON_CACHE_DIR", "")
    monkeypatch.setenv("TRITON_HOME", str(tmp_path / "home"))
    checks.check_kernel_folder("cpu")
    assert os.environ["TRITON_CACHE_DIR"] == ""
    checks.check_kernel_folder("cuda:0")
    assert os.environ["TRITON_CACHE_DIR"] == str(tmp_path / "home" / ".triton" / "cache") and not caplog.records
    (tmp_path / "file").touch()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    checks.check_kernel_folder("cuda")
    folder = Path(os.environ["TRITON_CACHE_DIR"])
    assert folder.parent == tmp_path and folder.stat().st_mode & 0o077 == 0 and "TRITON_CACHE_DIR" in caplog.text
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "file"))
    with pytest.raises(UserError, match="neither in"):
        checks.check_kernel_folder("cuda")


def test_time_left_after_answers_that_were_found() -> None:
    """What another run made is neither left nor a measure of how fast this one is."""
    now = [0.0]
    clock = Clock(lambda: now[0])
    call = Call(clock, "generate_until", 4, quiet=True)
    call.expect(dict.fromkeys(range(4), (100, 10)))
    for index in (0, 1):
        call.answered(index, found=True)
    clock.switch("prefill", 100)
    now[0] += 5.0
    clock.switch("decode")
    clock.landed(10)
    now[0] += 20.0
    call.answered(2)
    assert call.left() == pytest.approx(25.0)
