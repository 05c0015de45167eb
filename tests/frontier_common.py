"""Tokenizers, model stand-ins and tasks for the test_frontier_* files, all made here: no downloads."""

from __future__ import annotations

import random
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from lm_eval.api.model import LM
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from lm_eval_sparse.frontier.niah import NiahDraft
from lm_eval_sparse.frontier.task import ForcedFrontierTask, FrontierTask

TASKS = Path(__file__).parent.parent / "tasks"

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Writes the BOS token itself, trims what it is given, and has no system role: three things templates really do.
TRIMMING = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system role') }}"
    "{% endif %}[{{ m['role'] }}]{{ m['content'] | trim }}[/]{% endfor %}"
    "{% if add_generation_prompt %}[model]{% endif %}"
)


def noise(seed: int, alphabet: str, count: int = 100_000) -> str:
    """So many characters of an alphabet of ASCII characters, the same for the same seed."""
    table = bytes(ord(alphabet[byte % len(alphabet)]) for byte in range(256))
    return random.Random(seed).randbytes(count).translate(table).decode()


def written(draft, units, filler=""):
    """A document as a task makes it, without what a task adds about tokens."""
    message = draft.message(units, filler)
    return {"input": str(message), "context": list(message.context), **draft.gold(units)}


def _corpus() -> list[str]:
    drafts = [NiahDraft(random.Random(i), forced=bool(i % 2)) for i in range(4)]
    return [draft.message(12, "") for draft in drafts] * 3 + [
        "this part of the text is of no use to anyone and can be passed over without any loss. " * 3,
        "it was put here only so that the whole comes out at the right size and not for what it says. " * 3,
        "what comes before it and what comes after it would be just the same if it had been left out. " * 3,
    ]


def _bpe(vocab: int, splits: list[Any], **kwargs: Any) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(**kwargs))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=["<|im_start|>", "<|im_end|>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    return tokenizer


def _with_bos(tokenizer: Tokenizer) -> Tokenizer:
    bos = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    return tokenizer


@cache
def tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """`bpe` (GPT-2 like), `digits` (single digits, ChatML), `bos` (adds BOS, trimming template), `bytes` (no merges),
    `wordpiece` (lower-cases, BOS), `unigram` (SentencePiece like, BOS)."""
    template = None
    if kind == "bpe":
        base = _bpe(1200, [])
    elif kind == "digits":
        base, template = _bpe(900, [pre_tokenizers.Digits(individual_digits=True)]), CHATML
    elif kind == "bos":
        base = _with_bos(_bpe(900, [pre_tokenizers.Split(Regex(r"[^\s\w]+[\r\n]*|\s*[\r\n]+"), "isolated")]))
        template = TRIMMING
    elif kind == "bytes":
        base = _bpe(260, [])
    elif kind == "wordpiece":
        base = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        base.normalizer = normalizers.BertNormalizer(lowercase=True)
        base.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        base.decoder = decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(
            vocab_size=700, special_tokens=["[UNK]", "<s>", "</s>"], show_progress=False
        )
        base.train_from_iterator(_corpus(), trainer)
        base = _with_bos(base)
    elif kind == "unigram":
        base = Tokenizer(models.Unigram())
        base.pre_tokenizer = pre_tokenizers.Metaspace()
        base.decoder = decoders.Metaspace()
        trainer = trainers.UnigramTrainer(
            vocab_size=600, special_tokens=["<s>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
        )
        base.train_from_iterator(_corpus(), trainer)
        base = _with_bos(base)
    else:
        raise ValueError(kind)
    return PreTrainedTokenizerFast(
        tokenizer_object=base, bos_token="<s>", eos_token="</s>", pad_token="</s>", chat_template=template
    )


KINDS = ("bpe", "digits", "bos", "bytes", "wordpiece", "unigram")


class StandIn(LM):
    """What a model type shows of itself to a task, with HFLM's rules for special tokens; answers come from `answer`."""

    def __init__(self, kind: str = "digits", max_length: int = 1_000_000, answer: Any = None):
        super().__init__()
        self.tokenizer, self.max_length, self.answer = tokenizer(kind), max_length, answer
        self.seen: list[Any] = []

    def tok_batch_encode(self, strings: list[str]) -> tuple[Any, Any]:
        options = {"add_special_tokens": False} if strings[0].startswith(self.tokenizer.bos_token) else {}
        encoded = self.tokenizer(strings, padding="longest", return_tensors="pt", **options)
        return encoded["input_ids"], encoded["attention_mask"]

    def tokens(self, text: str) -> int:
        return self.tok_batch_encode([text])[0].shape[1]

    def apply_chat_template(self, history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        from jinja2.exceptions import TemplateError

        try:
            return self.tokenizer.apply_chat_template(
                history, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except TemplateError:  # as HFLM does
            return self.apply_chat_template([m for m in history if m["role"] != "system"], add_generation_prompt)

    @property
    def tokenizer_name(self) -> str:
        return "stand-in"

    def generate_until(self, requests: list[Any], **_: Any) -> list[Any]:
        self.seen += requests
        return [self.answer(request) for request in requests]

    loglikelihood = generate_until

    def loglikelihood_rolling(self, requests: list[Any], **_: Any) -> list[Any]:
        raise NotImplementedError


def leaf(name: str = "frontier_niah_4k", **metadata: Any) -> FrontierTask:
    """The leaf `name` of tasks/, as lm-eval builds it; `metadata` as from --metadata or model arguments."""
    folder = TASKS / name.removeprefix("forced_").removeprefix("frontier_").rpartition("_")[0]
    config = _load(folder / f"{name}.yaml")
    shared = _load(folder / config.pop("include"))
    config = {**shared, **config, "metadata": {**shared["metadata"], **metadata}}
    for key in ("tag", "class"):
        config.pop(key)
    return (ForcedFrontierTask if name.startswith("forced_") else FrontierTask)(config=config)


def _load(path: Path) -> dict[str, Any]:
    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))
    return yaml.load(path.read_text(), Loader=Loader)


def build(task: FrontierTask, lm: StandIn, *, chat: bool = False, **kwargs: Any) -> FrontierTask:
    """Build `task`'s requests for `lm`, which must be the active model or, with `chat`, renders the template."""
    task.build_all_requests(apply_chat_template=chat, chat_template=lm.apply_chat_template if chat else None, **kwargs)
    return task
