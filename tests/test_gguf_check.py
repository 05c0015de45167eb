"""Cut, damaged and foreign files against `gguf_check`; the files are written by the `gguf` library itself."""

import struct
import time
from pathlib import Path

import gguf
import numpy as np
import pytest

from lm_eval_sparse import gguf_check
from lm_eval_sparse.errors import UserError


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
    start = time.perf_counter()
    gguf_check.check(path)
    assert time.perf_counter() - start < 2
