"""Encoding many continuations of one prompt: the same tokens as encoding each text as a whole, with less work."""

from __future__ import annotations

import random

import pytest
from frontier_common import KINDS, tokenizer

from lm_eval_sparse.frontier import recipe
from lm_eval_sparse.model.encoding import SharedEncoder

ENDS = ["Answer:\n", "Answer: ", "Answer:\n\n", "x", "", "<|im_end|>\n<|im_start|>assistant\n", "\n \n", "end.\n\n\n"]


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_those_of_the_whole_text(kind):
    tok, source = tokenizer(kind), random.Random(3)
    encoder = SharedEncoder(tok.encode)
    for end in ENDS:
        for name in ("vt", "story_filtering"):
            prompt = recipe(name).draft(4096, 0, source.randrange(99), True).message(9, "") + end
            assert encoder.prompt(prompt) == tok.encode(prompt)
            for _ in range(6):
                more = "".join(
                    source.choices(["\n", " ", "12", "ABCDE", " the", "é", "s", ".", "数"], k=source.randint(0, 6))
                )
                assert encoder(prompt + more, len(prompt)) == tok.encode(prompt + more)


@pytest.mark.parametrize(
    "prompt", ["", "\n", "one line", "a\n" * 400, "\n" * 900, " \n" * 500, "word " * 300, "é" * 700]
)
def test_odd_prompts(prompt):
    tok = tokenizer("bpe")
    encoder = SharedEncoder(tok.encode)
    for more in ("", " more", "\nmore", "s"):
        assert encoder(prompt + more, len(prompt)) == tok.encode(prompt + more)


@pytest.mark.parametrize("kind", KINDS)
def test_the_prompt_is_read_a_few_times_however_many_continuations_there_are(kind):
    tok, read = tokenizer(kind), []

    def encode(text, **options):
        read.append(len(text))
        return tok.encode(text, **options)

    prompt = recipe("vt").draft(4096, 0, 0, True).message(40, "")
    encoder = SharedEncoder(encode)
    for i in range(100):
        encoder(f"{prompt}The value of ABCDE is {i}", len(prompt))
    assert sum(read) < 3 * len(prompt) + 100 * 900


def test_a_tokenizer_that_joins_over_the_cut_is_used_as_it_is():
    def encode(text, add_special_tokens=None):
        """One token per text length parity and line, so that no cut ever agrees."""
        return [len(text), *map(len, text.split("\n"))]

    encoder = SharedEncoder(encode)
    prompt = "line of text\n" * 60
    assert encoder(prompt + "more", len(prompt)) == encode(prompt + "more")


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_that_are_expected_are_read_together(kind):
    tok, together = tokenizer(kind), []

    def encode_many(texts, **options):
        together.append(len(texts))
        return [tok.encode(text, **options) for text in texts]

    prompts = [recipe("vt").draft(4096, 0, seed, True).message(9, "") for seed in range(20)]
    encoder = SharedEncoder(tok.encode, encode_many)
    encoder.expect(prompts)
    for prompt in (*prompts, "another one", *prompts[:2]):
        for more in (" more", "\nmore"):
            assert encoder(prompt + more, len(prompt)) == tok.encode(prompt + more)
    assert together == [16, 4]


@pytest.mark.parametrize("kind", KINDS)
def test_texts_of_a_prompt_are_read_together(kind):
    tok, alone = tokenizer(kind), []

    def encode(text, **options):
        alone.append(text)
        return tok.encode(text, **options)

    encoder = SharedEncoder(encode, lambda texts, **options: [tok.encode(text, **options) for text in texts])
    prompt = recipe("vt").draft(4096, 0, 5, True).message(9, "")
    texts = [prompt, *(prompt + more for more in (" 12", "\nABCDE", "s", " the numbers", ""))]
    encoder.together(texts, len(prompt))
    before = len(alone)
    assert [encoder(text, len(prompt)) for text in texts] == [tok.encode(text) for text in texts]
    assert len(alone) <= before + (len(texts) if not encoder._first else 0)
