"""The benchmarks of decoding in their small form, and their arithmetic: bytes, rates, ratios, targets, tables."""

import importlib
import json
import logging
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import tiny
import torch
import transformers

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
decode = importlib.import_module("decode")
generate = importlib.import_module("generate")


@pytest.fixture(autouse=True)
def as_before():
    """The scripts set threads and log levels of their process."""
    threads, level = torch.get_num_threads(), logging.getLogger("lm_eval").level
    yield
    torch.set_num_threads(threads)
    logging.getLogger("lm_eval").setLevel(level)


# --- decode.py -----------------------------------------------------------------------------------------------------

SMALL = [
    *("--device", "cpu", "--lengths", "100", "167", "--batches", "1", "3", "--heads", "6", "--kv_heads", "2"),
    *("--head_dim", "16", "--calls", "3", "--sparsities", "0.5", "0.9", "--page_batches", "3", "--other_pages", "32"),
]


@pytest.fixture(scope="module")
def decoded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("decode")
    assert decode.main([*SMALL, "--output", str(folder)]) == 0
    return folder, json.loads((folder / "decode_cpu.json").read_text())


def test_every_candidate_has_a_row(decoded):
    folder, content = decoded
    assert content["finished"]
    assert sorted(path.name for path in folder.iterdir()) == ["decode_cpu.json", "decode_cpu.md"]
    for batch in (1, 3):
        for length in (100, 167):
            rows = [row for row in content["rows"] if (row["batch"], row["length"]) == (batch, length)]
            names = [(row["name"], row.get("sparsity")) for row in rows]
            expected = [(name, None) for name in decode.DENSE]
            expected += [(name, sparsity) for name in ("eviction", "quest/16") for sparsity in (0.5, 0.9)]
            if (batch, length) == (3, 167):
                expected.append(("quest/32", 0.9))
            assert names == expected
    for row in content["rows"]:
        cuda_only = row["name"] in ("SDPA cuDNN", "flash-attn-4")
        assert ("failed" in row) == cuda_only, row
        assert cuda_only or row["us"] > 0


def test_bytes_sparsity_and_ratios_of_a_small_run(decoded):
    content = decoded[1]
    copy = content["device"]["copy_tb_s"]
    for row in content["rows"]:
        if "failed" in row:
            continue
        sequences, length = 2 * row["batch"], row["length"]
        dense = 2 * sequences * length * 16 * 4
        if row["kind"] == "dense":
            assert row["bytes"] == dense
        if row["kind"] == "eviction":
            assert row["measured_sparsity"] == pytest.approx(row["sparsity"], abs=0.02)
            assert row["bytes"] == pytest.approx(dense * (1 - row["measured_sparsity"]))
        if row["kind"] == "quest":
            page = row["page"]
            assert row["measured_sparsity"] == pytest.approx(row["sparsity"], abs=1.5 * page / length)
            assert row["key_value_bytes"] == pytest.approx(dense * (1 - row["measured_sparsity"]))
            assert row["bound_bytes"] == sequences * ((length - 1) // page) * 2 * 16 * 4
            assert row["bytes"] == row["key_value_bytes"] + row["bound_bytes"]
            assert set(row["parts"]) == {"append", "choose", "read"}
        assert row["gb_s"] == pytest.approx(row["bytes"] / row["us"] / 1e3)
        assert row["of_copy"] == pytest.approx(row["gb_s"] / 1e3 / copy)
        assert row["over_cudnn"] is None
        best = min(
            other["us"]
            for other in content["rows"]
            if (other["kind"], other["batch"], other["length"]) == ("dense", row["batch"], length) and "us" in other
        )
        assert row["over_fastest"] == pytest.approx(best / row["us"])


def test_table_names_device_versions_and_reasons(decoded):
    text = (decoded[0] / "decode_cpu.md").read_text()
    assert f"torch {torch.__version__}" in text and "CPU, " in text
    assert "| P6 | batch 8: at least 7.5x | - | not measured |" in text
    assert "- flash-attn-4: RuntimeError: flash-attn-4 runs on NVIDIA GPUs" in text
    for title in ("## Batch 3", "Other page sizes:", "## Not measured"):
        assert title in text


def test_a_wrong_candidate_is_a_row_that_says_so(monkeypatch):
    own = decode.DENSE["paged_decode"][""]
    monkeypatch.setitem(decode.DENSE, "paged_decode", {"": lambda caches: lambda i: own(caches)(i) * 1.01})
    options = decode.parsed([*SMALL, "--lengths", "100", "--batches", "1"])
    rows = decode.run(options, lambda content: None)["rows"]
    found = {row["name"]: row for row in rows}
    assert "wrong result: relative error 0.01" in found["paged_decode"]["failed"]
    assert "us" in found["SDPA flash"] and "us" in found["quest/16"]


def test_wrong_pages_are_noticed():
    scores = torch.arange(40.0).repeat(3, 1)[:, None, None]
    budget = decode.PageBudget(16, None, 0.1, 1)
    length = 16 * 40 + 5
    good = torch.tensor([37, 38, 39, 40], dtype=torch.int32).repeat(3, 1)[:, None, None]
    counts = torch.full((3, 1, 1), 4, dtype=torch.int32)
    decode.check_selection(decode.Reads(good, counts, 16), scores, 40, budget, length)
    for pages, number in (([36, 38, 39, 40], 4), ([36, 37, 38, 39], 4), ([39, 40, 0, 0], 2)):
        bad = good.clone()
        bad[2, 0, 0] = torch.tensor(pages)
        wrong = counts.clone()
        wrong[2] = number
        with pytest.raises(ValueError, match="wrong pages"):
            decode.check_selection(decode.Reads(bad, wrong, 16), scores, 40, budget, length)


def test_copies_keep_the_cache_cold_and_fit(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    options = decode.parsed(["--device", "cuda"])
    assert (options.lengths, options.batches, options.dtype) == (list(decode.LENGTHS), [1, 8, 32], "bfloat16")
    for batch in options.batches:
        for length in options.lengths:
            size = 2 * batch * 8 * length * 128 * 2
            calls, copies = decode.sizes(size, options)
            assert 4 <= calls <= 20 and 1 <= copies <= calls
            assert copies * size <= max(48 << 30, size)
            # Between two reads of a copy: either half a GiB, or the write that comes before each replay.
            assert copies * size * 0.05 >= 0.99 * (512 << 20) or copies == calls


def invented(length=131072, batch=1, quest=30.0):
    """Rows as a GPU might give them, of one batch and length."""
    size = 2 * batch * 8 * length * 128 * 2
    rows = [
        {"kind": "dense", "name": name, "us": us, "bytes": size, "timed": timed, "way": "rows", "not_captured": "no"}
        for name, us, timed in (("SDPA cuDNN", 190.0, "graph"), ("flash-attn-4", 170.0, "launched"))
    ]
    rows.append({"kind": "eviction", "name": "eviction", "sparsity": 0.95, "us": 12.0, "bytes": size // 20})
    rows.append(
        {"kind": "quest", "name": "quest/16", "page": 16, "sparsity": 0.95, "us": quest, "bytes": size // 9,
         "measured_sparsity": 0.95, "parts": {"append": 2.0, "choose": 18.0, "read": 10.0}}
    )  # fmt: skip
    for row in rows:
        row |= {"batch": batch, "length": length, "timed": row.get("timed", "graph")}
    return decode.compared(rows, 4.0)


def content_of(rows):
    return {
        "finished": True,
        "device": {"name": "Some GPU", "copy_tb_s": 4.0},
        "versions": {"torch": "9.9", "triton": None},
        "shape": {"heads": 32, "kv_heads": 8, "head_dim": 128, "dtype": "bfloat16"},
        "lengths": [131072],
        "batches": [1, 8],
        "sparsities": [0.95],
        "page_size": 16,
        "rows": rows,
    }


def test_targets_and_marks_of_a_gpu_run():
    rows = invented() + invented(batch=8, quest=30.0)
    assert rows[3]["over_cudnn"] == pytest.approx(190 / 30) and rows[3]["over_fastest"] == pytest.approx(170 / 30)
    assert [(t["batch"], t["reached"]) for t in decode.targets(rows)] == [(1, True), (8, False)]
    text = decode.markdown(content_of(rows))
    assert "| P6 | batch 1: at least 6x | 6.33x | reached |" in text
    assert "| P6 | batch 8: at least 7.5x | 6.33x | **missed** |" in text
    assert "| flash-attn-4 | **170\\* (79%)** |" in text  # 536.9 MB in 170 us of 4 TB/s
    assert "| 1 | 128K | 16 | 0.95 | 0.9500 | 2.0 | 18.0 | 10.0 | 30.0 | 67% | 59.7 |" in text
    assert "not captured in a graph, so launches count: flash-attn-4: no" in text


def test_picture_and_table_come_from_the_json_alone(tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "decode_cuda.json"
    path.write_text(json.dumps(content_of(invented() + invented(batch=8))))
    assert decode.main(["--plot", str(path), "--picture", str(tmp_path / "p.png")]) == 0
    assert (tmp_path / "p.png").stat().st_size > 10_000 and "Some GPU" in (tmp_path / "decode_cuda.md").read_text()
    assert decode.main(["--plot", str(tmp_path / "none.json")]) == 1


# --- generate.py ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory):
    return tiny.tiny_llama(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def generated(tiny_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("generate")
    arguments = ["--device", "cpu", "--models", str(tiny_folder), "--lengths", "70", "--batches", "1", "2"]
    arguments += ["--methods", "dense", "hf", "quest", "ada_snapkv+quest", "snapkv", "--tokens", "9"]
    arguments += ["--hf_tokens", "7", "--threads", "1", "--output", str(folder)]
    made = generate.language_model

    def language_model(method, *arguments):
        if method == "snapkv":
            raise ValueError("no such luck")
        return made(method, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generate, "language_model", language_model)
        assert generate.main(arguments) == 0
    return folder, json.loads((folder / "generate_cpu.json").read_text())


def test_every_method_is_measured_beside_hf(generated):
    folder, content = generated
    assert content["finished"] and sorted(p.name for p in folder.iterdir()) == ["generate_cpu.json", "generate_cpu.md"]
    order = ["hf", "dense", "quest", "ada_snapkv+quest", "snapkv"]
    assert [(row["batch"], row["method"]) for row in content["rows"]] == [(n, name) for n in (1, 2) for name in order]
    base = {row["batch"]: row for row in content["rows"] if row["method"] == "hf"}
    for row in content["rows"]:
        if row["method"] == "snapkv":
            assert "no such luck" in row["failed"] and "tokens_s" not in row
            continue
        # The first token is the prefill's, and the second ends the step in which decoding starts: that of all rows, or
        # of the first one where they are decoded one at a time, as in fp32 on a CPU.
        assert row["tokens"] == (row["batch"] * (7 - 2) if row["method"] == "hf" else row["batch"] * (9 - 1) - 1)
        assert row["tokens_s"] == pytest.approx(row["tokens"] / row["decode_s"])
        assert row["over_hf"] == pytest.approx(row["tokens_s"] / base[row["batch"]]["tokens_s"])
        assert 0 < row["prefill_s"] < row["whole_s"] and row["decode_s"] < row["whole_s"]
        assert ("warm_up_s" in row) == (row["batch"] == 1)
        assert list(row["loops"]) == (["hf"] if row["method"] == "hf" else ["eager"])
        if row["method"] == "dense":
            assert row["same_as_hf"] == [row["batch"], row["batch"]]
        if row["method"] == "quest":
            assert row["executed_sparsity"] > 0.5 and row["sparsities"] == {"decode_sparsity": 0.9}
    text = (folder / "generate_cpu.md").read_text()
    assert f"transformers {transformers.__version__}" in text and "| 70 | 2 | dense |" in text and "2 of 2" in text
    assert "snapkv: ValueError: no such luck" in text


def test_clock_of_our_loop():
    # Two prompts, whose prefills take 1 and 2 seconds; 4 seconds until the first step is there; steps of half a second.
    clock = generate.Clock(calls=[(10.0, 1, True), (11.5, 1, True), (14.0, 2, False), (17.5, 2, False)])
    clock.taken = [(11.0, 1), (13.5, 2), (17.5, 1), (17.5, 2)]
    clock.taken += [(17.5 + 0.5 * step, row) for step in (1, 2, 3, 4) for row in (1, 2)]
    figures = clock.figures()
    assert figures == pytest.approx({"prefill_s": 3.0, "start_s": 3.5, "tokens": 8, "decode_s": 2.0})
    # One answer after the other: nothing but the first of all steps is left out.
    clock.taken = [(11.0, 1), (13.5, 2), *((14.0 + 0.25 * step, 1 + (step >= 5)) for step in range(10))]
    assert clock.figures() == pytest.approx({"prefill_s": 3.0, "start_s": 0.25, "tokens": 9, "decode_s": 2.25})
    clock.taken = [(11.0, 1), (13.5, 2)]
    assert clock.figures() == {"prefill_s": 3.0, "tokens": 0, "decode_s": 0.0}
    assert generate.with_rates(clock.figures(), 5.0, 2, 3, 256)["tokens_s"] is None


def test_clock_of_transformers_loop():
    calls = [(1.0, 4, True), (3.0, 4, False), (3.5, 4, False), (4.0, 4, False)]
    assert generate.Clock(calls).figures() == {"prefill_s": 2.0, "tokens": 8, "decode_s": 1.0}
    twice = calls + [(9.0, 4, True), (10.0, 4, False), (10.5, 4, False)]  # what lies between two batches counts nowhere
    figures = generate.Clock(twice).figures()
    assert figures == {"prefill_s": 3.0, "tokens": 12, "decode_s": 1.5}
    assert generate.with_rates(figures, 10.0, 4, 5, 13) == {**figures, "tokens_s": 8.0, "answer_s": 14.0}
    assert generate.Clock().figures() == {"prefill_s": 0.0, "tokens": 0, "decode_s": 0.0}


def test_targets_and_ratios_over_hf():
    rows = [
        {"model": "smollm2", "method": method, "length": 1000, "batch": batch, "tokens_s": rate, "answer_s": 100 / rate}
        for batch in (1, 8)
        for method, rate in (("hf", 10.0), ("dense", 25.0 if batch == 8 else 200.0))
    ]
    generate.compared(rows)
    assert [row["over_hf"] for row in rows] == [1, 20, 1, 2.5] == [pytest.approx(row["answer_over_hf"]) for row in rows]
    answers = generate.targets(rows, "cuda")
    assert [(a["batch"], a["wanted"], a["reached"]) for a in answers] == [(1, 10, True), (8, 3, False)]
    assert [a["reached"] for a in generate.targets(rows, "cpu")] == [True, True]


def test_same_answers_up_to_the_shorter_one():
    assert generate.same(["abc", "ab", "b", "x\ufffd"], ["ab", "abc", "c", "x\u00e9y"]) == 3


def test_arguments_of_methods():
    assert generate.sparse_arguments("dense", 0.9) == {}
    assert generate.sparse_arguments("snapkv", 0.9) == {"method": "snapkv", "kv_sparsity": 0.9}
    assert generate.sparse_arguments("flexprefill+snapkv+quest", 0.9) == {
        "method": "flexprefill+snapkv+quest", "prefill_sparsity": 0.9, "kv_sparsity": 0.5, "decode_sparsity": 0.9,
    }  # fmt: skip


def test_prompts_have_the_length_asked_for(tiny_folder):
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_folder)
    texts = generate.prompts(tokenizer, 400, 4)
    lengths = [len(tokenizer.encode(text, add_special_tokens=False)) for text in texts]
    assert all(375 <= length <= 405 for length in lengths) and len(set(texts)) == 4
    assert generate.prompts(tokenizer, 400, 4) == texts


def test_a_shape_whose_vocabulary_is_larger_than_the_tokenizers(tiny_folder, monkeypatch):
    small = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
             "intermediate_size": 96, "vocab_size": 20_000}  # fmt: skip
    monkeypatch.setattr(generate, "SHAPE_8B", {**generate.SHAPE_8B, **small})
    monkeypatch.setattr(generate.embedded, "ensure", lambda: tiny_folder)
    model, _ = generate.load("8b", "cpu")
    assert model.dtype == torch.bfloat16
    model.float()
    ids = torch.arange(3, 40)[None]
    logits = model(ids).logits[0]
    assert logits.isfinite().all() and (logits[:, 2] == generate.NEVER).all()
    assert (logits.argmax(-1) > tiny.VOCABULARY).any()
    # Frequencies are those of a model made in the usual way: positions matter, and are right.
    usual = transformers.LlamaForCausalLM(transformers.LlamaConfig(**generate.SHAPE_8B)).eval()
    usual.load_state_dict(model.state_dict())
    assert torch.allclose(usual(ids).logits[0, :, 3:], logits[:, 3:], atol=1e-5)
    arguments = ["--device", "cpu", "--models", "8b", "--lengths", "50", "--batches", "2", "--methods", "hf", "dense"]
    options = generate.parsed([*arguments, "--tokens", "5", "--hf_tokens", "5"])
    rows = generate.run(options, lambda content: None)["rows"]  # in bf16, so side by side
    assert [row["tokens"] for row in rows] == [6, 6]


def test_a_cell_that_takes_too_long_is_ended(tiny_folder, monkeypatch):
    handler, forbid = signal.getsignal(signal.SIGALRM), generate.forbid

    def slow(model, tokens):
        forbid(model, tokens)
        model.register_forward_pre_hook(lambda module, arguments: time.sleep(0.005))

    monkeypatch.setattr(generate, "forbid", slow)
    arguments = ["--device", "cpu", "--models", str(tiny_folder), "--lengths", "50", "--batches", "1"]
    arguments += ["--methods", "hf", "dense", "--tokens", "1500", "--hf_tokens", "1500", "--cell_seconds", "2"]
    rows = generate.run(generate.parsed(arguments), lambda content: None)["rows"]
    for row in rows:
        assert row["cut"] == "ended after 2 s" and 0 < row["tokens"] < 1498 and "answer_s" not in row
    assert signal.getsignal(signal.SIGALRM) is handler and threading.current_thread() is threading.main_thread()
    text = generate.markdown(
        {"finished": True, "device": {"name": "x", "kind": "cpu", "threads": 1}, "versions": {}, "rows": rows,
         "options": vars(generate.parsed(arguments)), "targets": []}
    )  # fmt: skip
    assert "\\* ended after 2 s" in text
    # Nothing is begun after the whole time.
    options = generate.parsed([*arguments, "--minutes", "1e-9"])
    begin = time.perf_counter()
    rows = generate.run(options, lambda content: None)["rows"]
    assert [row["failed"] for row in rows] == ["1e-09 minutes were over"] * 2 and time.perf_counter() - begin < 5


# --- on a GPU ------------------------------------------------------------------------------------------------------


# --- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batches", "0"], "--batches 0: give numbers above 0"),
        (["--lengths", "512", "-1"], "--lengths 512 -1: give"),
        (["--minutes", "0"], "--minutes 0.0: give"),
        (["--output", "{file}"], "cannot be made a folder"),
        (["--output", "{file}/x"], "cannot be made a folder"),
        (["--device", "cuda"], "sees no CUDA device"),
    ],
)
@pytest.mark.parametrize("script", [decode, generate], ids=lambda script: script.__name__)
def test_what_cannot_be_measured_is_refused_first(script, arguments, message, tmp_path, capsys):
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    file = tmp_path / "file"
    file.write_text("kept")
    with pytest.raises(SystemExit) as ended:
        script.main([argument.format(file=file) for argument in arguments])
    assert ended.value.code == 2 and message in capsys.readouterr().err and file.read_text() == "kept"


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        (decode, ["--page_size", "0"], "--page_size 0: give"),
        (decode, ["--sparsities", "1.5"], "from 0 to below 1"),
        (decode, ["--heads", "3", "--kv_heads", "2"], "not a multiple"),
        (generate, ["--methods", "hf", "quest", "foo"], "--methods foo: "),
        (generate, ["--methods", "flexprefill+foo"], "--methods flexprefill+foo: "),
        (generate, ["--sparsity", "1.5"], "--sparsity 1.5: give a number from 0 to below 1"),
        (generate, ["--models", "org/model"], "--models org/model: accepted are smollm2, 8b and folders"),
        (generate, ["--tokens", "2"], "give at least 3"),
    ],
)
def test_bad_arguments(script, arguments, message, capsys):
    with pytest.raises(SystemExit) as ended:
        script.main(["--device", "cpu", *arguments])
    assert ended.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("script", [decode, generate], ids=lambda script: script.__name__)
def test_a_run_without_any_figure_fails_and_overwrites_nothing(script, tiny_folder, tmp_path, monkeypatch, capsys):
    def broken(*arguments, **options):
        raise MemoryError("none left")

    kept = tmp_path / f"{script.__name__}_cpu.json"
    kept.write_text("kept")
    monkeypatch.setattr(*((decode, "measure_cell") if script is decode else (generate, "language_model")), broken)
    arguments = ["--device", "cpu", "--lengths", "64", "--batches", "1", "--output", str(tmp_path)]
    assert script.main([*arguments, *(["--models", str(tiny_folder)] if script is generate else [])]) == 1
    out = capsys.readouterr()
    assert "MemoryError: none left" in out.out and "nothing could be measured" in out.err
    assert kept.read_text() == "kept" and [path.name for path in tmp_path.iterdir()] == [kept.name]


@pytest.mark.gpu
def test_operators_are_captured_on_a_gpu(tmp_path):
    arguments = ["--lengths", "512", "1000", "--batches", "1", "3", "--page_lengths", "512", "--sparsities", "0.9"]
    assert decode.main([*arguments, "--output", str(tmp_path), "--picture", str(tmp_path / "p.png")]) == 0
    content = json.loads((tmp_path / "decode_cuda.json").read_text())
    own = [row for row in content["rows"] if row["kind"] != "dense" or row["name"] == "paged_decode"]
    assert content["finished"] and len(own) == 4 * 3 + 2
    for row in own:
        assert row.get("timed") == "graph" and "parts_timed" not in row, row


@pytest.mark.gpu
def test_steps_are_captured_on_a_gpu(tiny_folder, tmp_path):
    arguments = ["--models", str(tiny_folder), "--lengths", "300", "--batches", "1", "2", "--tokens", "20"]
    assert generate.main([*arguments, "--methods", "hf", "dense", "quest", "snapkv", "--output", str(tmp_path)]) == 0
    for row in json.loads((tmp_path / "generate_cuda.json").read_text())["rows"]:
        assert row["tokens"] >= row["batch"] * (31 if row["method"] == "hf" else 18) and row["peak_bytes"] > 0, row
        assert list(row["loops"]) == (["hf"] if row["method"] == "hf" else ["cuda_graph"]), row
