"""Cut, damaged and foreign files against `gguf_check`; the files are written by the `gguf` library itself."""

import io
import os
import struct
import time
import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest

from lm_eval_sparse.errors import UserError
from lm_eval_sparse.model import gguf_check


def write(path: Path, tokens: int = 20, alignment: int | None = None, order=gguf.GGUFEndian.LITTLE) -> Path:
    """A small file with every kind of metadata, and weights in three types, the last of odd length."""
    out = gguf.GGUFWriter(path, "llama", endianess=order)
    if alignment:
        out.add_custom_alignment(alignment)
    out.add_context_length(128)
    out.add_layer_norm_rms_eps(1e-5)
    out.add_bool("test.flag", True)
    out.add_int64("test.negative", -5)
    out.add_array("test.numbers", [1, 2, 3])
    out.add_tokenizer_model("gpt2")
    out.add_token_list([f"tok{i}" for i in range(tokens)])
    out.add_token_scores([0.5] * tokens)
    numbers = np.random.default_rng(0).standard_normal((4, 64), dtype=np.float32)
    out.add_tensor("a.weight", numbers)
    packed = gguf.quants.quantize(numbers, gguf.GGMLQuantizationType.Q4_1)
    out.add_tensor("b.weight", packed, raw_dtype=gguf.GGMLQuantizationType.Q4_1)
    out.add_tensor("c.bias", np.ones(7, dtype=np.float16))
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return path


def complaint(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        gguf_check.check(path)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("alignment", [None, 4096])
def test_whole_file_passes_and_needs_no_byte_more_than_the_library_says(tmp_path, alignment):
    path = write(tmp_path / "m.gguf", alignment=alignment)
    gguf_check.check(path)
    header = gguf_check.read_header(path)
    last = max(gguf.GGUFReader(path).tensors, key=lambda tensor: tensor.data_offset)
    assert header.bytes_needed == last.data_offset + last.n_bytes <= path.stat().st_size
    assert header.n_tensors == 3
    assert header.metadata["tokenizer.ggml.tokens"][:2] == ["tok0", "tok1"]
    assert header.metadata["test.numbers"] == [1, 2, 3]
    assert header.metadata["test.negative"] == -5
    assert header.metadata["test.flag"] is True
    assert header.metadata["llama.context_length"] == 128
    # The writer pads the last tensor; a file without that padding is whole, and so is one with a tail.
    path.write_bytes(path.read_bytes()[: header.bytes_needed])
    gguf_check.check(path)
    path.write_bytes(path.read_bytes() + b"tail")
    gguf_check.check(path)


def test_truncated_anywhere(tmp_path):
    path = write(tmp_path / "whole.gguf")
    needed = gguf_check.read_header(path).bytes_needed
    data, cut = path.read_bytes(), tmp_path / "cut.gguf"
    for size in range(4, needed):  # every length there is, in the header and in the weights
        cut.write_bytes(data[:size])
        message = complaint(cut)
        assert "truncated" in message and f"{size:,} bytes on disk" in message and "again" in message, message
    assert f"{needed:,} needed (1 missing)" in message


def test_big_endian_file(tmp_path):
    path = write(tmp_path / "m.gguf", order=gguf.GGUFEndian.BIG)
    gguf_check.check(path)
    path.write_bytes(path.read_bytes()[:-100])
    assert "truncated" in complaint(path)


def test_not_a_gguf(tmp_path):
    path = tmp_path / "m.gguf"
    for content, said in [(b"", "empty"), (b"GG", "b'GG'"), (b"PK\x03\x04" * 9, "b'PK\\x03\\x04'")]:
        path.write_bytes(content)
        message = complaint(path)
        assert "not a GGUF file" in message and said in message


def test_missing_file_names_what_is_there(tmp_path):
    assert "does not exist" in complaint(tmp_path / "nowhere" / "m.gguf")
    write(tmp_path / "smollm-q4.gguf")
    assert "did you mean 'smollm-q4.gguf'?" in complaint(tmp_path / "smolm-q4.gguf")
    assert "found there: smollm-q4.gguf" in complaint(tmp_path / "other.bin")
    assert "is a folder" in complaint(tmp_path)


@pytest.mark.parametrize(
    ("at", "value", "said"),
    [
        (4, struct.pack("<I", 1), "version 1"),
        (4, struct.pack("<I", 77), "version 77"),
        (8, struct.pack("<Q", 2**60), "truncated"),  # tensors
        (16, struct.pack("<Q", 2**60), "truncated"),  # metadata values
        (24, struct.pack("<Q", 2**63), "truncated"),  # length of the first key
        (24 + 8 + len("general.architecture"), struct.pack("<I", 99), "value type 99"),
    ],
)
def test_nonsense_in_the_header(tmp_path, at, value, said):
    path = write(tmp_path / "m.gguf")
    data = bytearray(path.read_bytes())
    data[at : at + len(value)] = value
    path.write_bytes(data)
    assert said in complaint(path)


def test_random_damage_never_escapes_as_another_error(tmp_path):
    path = write(tmp_path / "m.gguf")
    data, rng = path.read_bytes(), np.random.default_rng(1)
    for _ in range(500):
        damaged = bytearray(data)
        for at in rng.integers(4, 600, size=3):
            damaged[at] = rng.integers(256)
        path.write_bytes(damaged)
        try:
            gguf_check.check(path)
        except UserError as error:
            assert "\n" not in str(error)


def test_one_part_of_a_split_model(tmp_path):
    out = gguf.GGUFWriter(tmp_path / "m-00002-of-00003.gguf", "llama")
    out.add_uint16("split.no", 1)
    out.add_uint16("split.count", 3)
    out.add_tensor("a.weight", np.ones(4, dtype=np.float32))
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    assert "part 2 of a GGUF model split into 3 files" in complaint(tmp_path / "m-00002-of-00003.gguf")


def test_a_large_vocabulary_and_file_cost_little(tmp_path):
    path = write(tmp_path / "m.gguf", tokens=300_000)
    with path.open("r+b") as file:
        file.truncate(2**33)  # sparse: 8 GiB that take no disk
    start = time.process_time()
    gguf_check.check(path)
    assert time.process_time() - start < 2


def raw(
    *values: tuple[str, int, bytes], tensors: bytes = b"", n_tensors: int = 0, n_values: int | None = None
) -> bytes:
    """A file by hand: metadata as (key, value type, value's bytes), and the bytes of the tensor table."""
    head = b"GGUF" + struct.pack("<IQQ", 3, n_tensors, len(values) if n_values is None else n_values)
    rows = [struct.pack("<Q", len(key)) + key.encode() + struct.pack("<I", kind) + value for key, kind, value in values]
    return head + b"".join(rows) + tensors


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def tensor(name: str, *shape: int, offset: int = 0, kind: int = 0) -> bytes:
    return text(name.encode()) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


COUNT2 = ("split.count", 2, struct.pack("<H", 2))
HUGE = struct.pack("<Q", 2**30)
#: Bytes of a file -> what must be said of it.
DAMAGED = {
    "part is a text": (raw(COUNT2, ("split.no", 8, text(b"x"))), "split.no is x, not a whole number"),
    "part is a bool": (raw(COUNT2, ("split.no", 7, b"\1")), "split.no is True, not a whole number"),
    "part is negative": (raw(COUNT2, ("split.no", 5, struct.pack("<i", -1))), "split.no is -1"),
    "parts are a text": (raw(("split.count", 8, text(b"2"))), "split.count is 2, not a whole number"),
    "parts are a fraction": (raw(("split.count", 6, struct.pack("<f", 2.0))), "split.count is 2.0"),
    "parts are negative": (raw(("split.count", 11, struct.pack("<q", -(2**60)))), "split.count is -"),
    "parts are a list": (raw(("split.count", 9, struct.pack("<IQB", 0, 1, 2))), "split.count is [2]"),
    "parts are skipped": (raw(("split.count", 9, struct.pack("<IQ", 8, 0))), "split.count is None"),
    "alignment 0": (raw(("general.alignment", 4, struct.pack("<I", 0))), "alignment 0"),
    "alignment 33": (raw(("general.alignment", 4, struct.pack("<I", 33))), "alignment 33"),
    "alignment is huge": (raw(("general.alignment", 10, struct.pack("<Q", 2**62))), "alignment 4611"),
    "alignment is a text": (raw(("general.alignment", 8, text(b"32"))), "alignment 32"),
    "alignment is a bool": (raw(("general.alignment", 7, b"\1")), "alignment True"),
    "a key twice": (raw(("a", 7, b"\1"), ("a", 7, b"\0")), "'a' is there twice"),
    "a tensor twice": (raw(tensors=tensor("t", 1) * 2, n_tensors=2), "tensor 't' is there twice"),
    "five dimensions": (raw(tensors=tensor("t", 1, 1, 1, 1, 1), n_tensors=1), "tensor 't' with 5 dimensions"),
    "a product": (raw(tensors=tensor("t", 2**63, 2**63), n_tensors=1), "tensor 't' of shape"),
    "an offset": (raw(tensors=tensor("t", 1, offset=2**63), n_tensors=1), "tensor 't' of shape [1] at byte"),
    "tensors": (raw(n_tensors=2**63), "truncated"),
    "values": (raw(n_values=2**63), "truncated"),
    "a list of lists": (raw(("a", 9, struct.pack("<IQ", 9, 1) * 9)), "value type 9"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGED)
def test_values_that_no_writer_writes(tmp_path, case):
    content, said = DAMAGED[case]
    (tmp_path / "m.gguf").write_bytes(content)
    message = complaint(tmp_path / "m.gguf")
    assert said in message and str(tmp_path / "m.gguf") in message and "again" in message


#: Bytes before a hole of 10 GB that takes no disk and holds what they announce -> what is said of it.
HOLES = {
    "values": (raw(n_values=2**28), "268,435,456 metadata values"),
    "values within the bound": (raw(n_values=99_999), "'' is there twice"),
    "tensors": (raw(n_tensors=2**28), "268,435,456 tensors"),
    "numbers": (raw(("a", 9, struct.pack("<I", 10) + HUGE)), "lists of more than"),
    "bytes": (raw(("a", 9, struct.pack("<I", 0) + HUGE)), "lists of more than"),
    "empty strings": (raw(("a", 9, struct.pack("<I", 8) + HUGE)), "lists of more than"),
    "lists of lists": (raw(("a", 9, struct.pack("<IQ", 9, 6_000_000))), "lists of more than"),
    "lists of lists within the bound": (raw(("a", 9, struct.pack("<IQ", 9, 20_000))), ""),
    "a text": (raw(("a", 8, struct.pack("<Q", 2**33))), "more than 268,435,456 bytes"),
    "a key": (raw(n_values=1) + struct.pack("<Q", 2**33), "more than 268,435,456 bytes"),
    "strings as long as all": (raw(("a", 9, struct.pack("<IQQ", 8, 9, 2**33))), "more than 268,435,456 bytes"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOLES)
@pytest.mark.parametrize("strings", [True, False])
def test_a_file_with_holes_costs_neither_time_nor_memory(tmp_path, case, strings):
    content, said = HOLES[case]
    (tmp_path / "m.gguf").write_bytes(content)
    with (tmp_path / "m.gguf").open("r+b") as file:
        file.truncate(10 * 2**30)
    begun = time.process_time()
    tracemalloc.start()
    try:
        gguf_check.read_header(tmp_path / "m.gguf", strings=strings)
    except UserError as error:
        assert said in str(error)
    finally:
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert time.process_time() - begun < 10 and most < 2**28


def test_what_is_no_file_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.gguf")
    (tmp_path / "away.gguf").symlink_to("nowhere")
    (tmp_path / "loop.gguf").symlink_to("loop.gguf")
    for name, said in {
        "pipe.gguf": "no regular file",
        "away.gguf": "cannot be read (No such file",
        "loop.gguf": "cannot be read (Too many levels",
        "nul\0l.gguf": "null character",
        "x" * 5000: "255 are allowed",
    }.items():
        assert said in complaint(tmp_path / name)
    assert complaint(Path("/dev/null")) == "GGUF file /dev/null is no regular file; give a file"


def test_a_file_that_shrinks_while_it_is_read(tmp_path):
    path = write(tmp_path / "m.gguf")
    data = path.read_bytes()
    reader = gguf_check._Reader(io.BytesIO(data[4:100]), len(data))
    with pytest.raises(gguf_check._EndsEarly):
        reader.header(True)


def test_bytes_that_are_no_text(tmp_path):
    (tmp_path / "m.gguf").write_bytes(raw(("a", 8, text(b"\xff\xfe")), ("b", 9, struct.pack("<IQ", 8, 0))))
    gguf_check.check(tmp_path / "m.gguf")
    assert gguf_check.read_header(tmp_path / "m.gguf").metadata == {"a": "��", "b": []}
