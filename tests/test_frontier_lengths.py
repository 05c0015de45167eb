"""Prompt lengths: exact in the evaluated model's tokens, never over, shrunk or skipped where the model is too short."""

from __future__ import annotations

import logging
import random

import pytest
from frontier_common import KINDS, StandIn, build, leaf, tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from lm_eval_sparse import protocol
from lm_eval_sparse.errors import UserError
from lm_eval_sparse.frontier import recipe
from lm_eval_sparse.frontier.fill import DoesNotFit, Filler, fit, fit_both
from lm_eval_sparse.frontier.meter import meter_for, tokenizer_hash
from lm_eval_sparse.protocol import SKIPPED, set_active_lm

SYSTEM = "You answer questions about long lists."


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LM_EVAL_SPARSE_CACHE", str(tmp_path))


def active(*args, **kwargs) -> StandIn:
    lm = StandIn(*args, **kwargs)
    set_active_lm(lm)
    return lm


@pytest.fixture
def no_active_lm(monkeypatch):
    monkeypatch.setattr(protocol, "_active", None)


# --------------------------------------------------------------------------------------------------- exact to a token

CASES = [(kind, False, None) for kind in KINDS]
CASES += [("bpe", False, SYSTEM), ("digits", True, None), ("digits", True, SYSTEM), ("bos", True, None)]
CASES += [("bos", True, SYSTEM)]


@pytest.mark.parametrize("name", ["frontier_niah_4k", "forced_frontier_niah_4k"])
@pytest.mark.parametrize(("kind", "chat", "system"), CASES)
def test_every_prompt_has_exactly_its_length(kind, chat, system, name):
    lm = active(kind)
    task = build(leaf(name), lm, chat=chat, limit=4, system_instruction=system)
    for instance in task.instances:
        context = instance.args[0]
        prompt = context[: getattr(context, "shared", len(context))]
        assert lm.tokens(prompt) == 4096 == instance.doc["tokens"]
        assert (SYSTEM in prompt) == (system is not None and kind != "bos")  # that template has no system role
        assert prompt.count("<s>") == (kind == "bos" and chat)
    assert task.config.metadata["prompt_tokens"] == 4096


@pytest.mark.parametrize("length", [8192, 16384])
def test_longer_leaves_are_exact_too(length):
    lm = active("bpe")
    task = build(leaf(f"frontier_niah_{length // 1024}k"), lm, limit=2)
    assert [lm.tokens(i.args[0]) for i in task.instances] == [length, length]


@pytest.mark.parametrize("name", ["niah", "vt", "cwe", "story_multihop"])
def test_a_long_prompt_is_tokenized_few_times(name):
    core, counted = tokenizer("bpe").backend_tokenizer, []

    def parts(texts):
        lengths = [len(encoded) for encoded in core.encode_batch_fast(texts, add_special_tokens=False)]
        counted.append(sum(lengths))
        return lengths

    def count(text):
        return parts([text])[0]

    budget = 32_768
    draft = recipe(name).draft(budget, 0, 0, False)
    fitted = fit(draft, budget, count, Filler(count), parts=parts)
    assert fitted.tokens == budget == count(draft.message(fitted.units, fitted.filler))
    # Filler lines and the check above included. The numbers in front of CWE's words shift with every word more, so it
    # has no parts that stay.
    assert sum(counted) <= (18 if name == "cwe" else 7) * budget


def test_distractors_fill_the_prompt_and_filler_only_the_rest():
    lm = active("digits")
    task = build(leaf(), lm, limit=8)
    for _, doc in task.doc_iterator(limit=8):
        lines = doc["input"].splitlines()
        entries = [line for line in lines if line.startswith("Stored under")]
        filler = [line for line in lines if line.startswith(("This part", "So", "Too", "Here", "Again"))]
        assert len(entries) == doc["pairs"] and len(filler) <= 1
        pair = (lm.tokens("\n".join(entries)) + 1) / len(entries)
        assert not filler or lm.tokens("\n" + filler[0]) < 1.75 * pair


# A synthetic tokenizer: one token for every unit of `sizes`, whatever the units are, and for every filler word.
class Blocks:
    def __init__(self, sizes, most):
        self.sizes, self.most, self.answer = sizes, most, ""

    def message(self, units, filler):
        body = "".join("u" * self.sizes[i % len(self.sizes)] + "\n" for i in range(units))
        return f"frame\n{body}{filler}"


def count_blocks(every, extra, seam=0):
    """`every` letters to a token, `extra` tokens around; next to the frame, filler costs `seam` tokens more or less."""

    def count(text):
        words = sum(-(-len(word) // every) for word in text.replace("u" * 10, " " + "w" * every + " ").split())
        return words + extra + (seam if text.startswith("frame") and text.endswith(".") else 0)

    return count


@settings(deadline=None, max_examples=150)
@given(
    st.lists(st.integers(10, 900), min_size=1, max_size=7),
    st.integers(0, 5000),
    st.integers(0, 300),
    st.integers(30, 4000),
    st.integers(1, 9),
    st.integers(-3, 3),
)
def test_a_fit_never_exceeds_its_budget_and_leaves_no_room(sizes, most, extra, budget, every, seam):
    blocks, count = Blocks(sizes, most), count_blocks(every, extra, seam)
    if count(blocks.message(0, "")) > budget:
        with pytest.raises(DoesNotFit):
            fit(blocks, budget, count, Filler(count))
        return
    fitted = fit(blocks, budget, count, Filler(count))
    assert fitted.tokens == count(blocks.message(fitted.units, fitted.filler)) <= budget
    if fitted.units + 3 <= most and len(sizes) == 1:  # two units may have made way for filler
        assert count(blocks.message(fitted.units + 3, "")) > budget
    if fitted.units < most:
        assert budget - fitted.tokens <= max(map(count, ("u" * size for size in sizes))) - extra + 9
    if every >= 9:  # one-token words: exact, but where the shortest line does not fit and there is no unit to give up
        assert fitted.tokens == budget or fitted.units == 0


@pytest.mark.parametrize("kind", KINDS)
def test_filler_lines_cost_what_was_asked(kind):
    lm = StandIn(kind)
    filler = Filler(lm.tokens)
    shortest = min(filler.cost(line) for line in ("So.", "Too.", "Here."))
    for tokens in range(160):
        line = filler.line(tokens)
        assert filler.cost(line) <= tokens
        assert (line == "") == (tokens < shortest)
        if tokens >= 14:
            assert filler.cost(line) == tokens
    assert Filler(lm.tokens).line(77) == filler.line(77)  # whatever was asked before


def test_documents_do_not_depend_on_the_documents_made_before():
    lm = active("unigram")
    forwards, backwards = build(leaf(), lm, samples=list(range(8))), build(leaf(seed=0), lm, samples=[7])
    for i in reversed(range(8)):
        assert backwards.eval_docs[i] == forwards.eval_docs[i]


# -------------------------------------------------------------------------------------------- the model's own limit


@pytest.mark.parametrize("alias", ["max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens"])
def test_gen_kwargs_count(alias):
    lm = active("digits", max_length=4096 + 20)
    task = leaf()
    del task.config.generation_kwargs["max_gen_toks"]
    task.set_config("generation_kwargs", {alias: 32}, update=True)
    build(task, lm, limit=1)
    assert lm.tokens(task.instances[0].args[0]) == 4096 - 12
    assert task.instances[0].args[1] == {"until": [], "do_sample": False, alias: 32}


@pytest.mark.parametrize(("kind", "chat"), [("digits", False), ("digits", True), ("bos", True), ("bytes", False)])
def test_the_twin_keeps_room_for_its_longest_answer(kind, chat):
    lm = active(kind, max_length=4096)
    task = build(leaf("forced_frontier_niah_4k", samples=20), lm, chat=chat)
    budget = task.config.metadata["prompt_tokens"]
    assert 0.9 * 4096 <= budget < 4096
    longest = 0
    for instance in task.instances:
        context, continuation = instance.args
        assert lm.tokens(context[: context.shared]) == budget
        longest = max(longest, lm.tokens(context + continuation))
    assert 4096 - 10 <= longest <= 4096  # used to the last few tokens, never over


def test_a_skipped_leaf_is_a_warning_and_one_tiny_stub_per_rank(caplog):
    lm = active("digits", max_length=2048)
    for name in ("frontier_niah_4k", "forced_frontier_niah_4k"):
        for rank in range(3):
            caplog.clear()
            with caplog.at_level(logging.WARNING):
                task = build(leaf(name), lm, rank=rank, world_size=3, cache_requests=True)
            assert [r for r in caplog.records if name in r.message and "2048" in r.message]
            (instance,) = task.instances
            ((doc_id, doc),) = task.doc_iterator(rank=rank, world_size=3)
            assert instance.doc_id == doc_id and SKIPPED in doc and doc[SKIPPED] == task.config.metadata["skipped"]
            assert len(instance.args[0]) < 100 and instance.args[0] == "This leaf is skipped."
            if name.startswith("frontier"):
                assert instance.args[1]["max_gen_toks"] == 1
            assert task.process_results(doc, ["anything"]) == {}
            assert len(task.eval_docs) == 100


def test_a_stub_survives_samples_of_any_size():
    lm = active("digits", max_length=2048)
    for rank in range(3):
        task = build(leaf(), lm, samples=[17, 3], rank=rank, world_size=3)
        assert task.instances[0].doc_id < 2  # lm-eval looks it up in the list of samples


def test_a_leaf_that_fits_again_is_no_longer_skipped():
    task = leaf()
    build(task, active("digits", max_length=2048), limit=1)
    assert "skipped" in task.config.metadata
    lm = active("digits")
    build(task, lm, limit=1)
    assert "skipped" not in task.config.metadata and lm.tokens(task.instances[0].args[0]) == 4096


def test_a_system_instruction_that_fills_the_prompt_skips_the_leaf():
    lm = active("digits")
    task = build(leaf(), lm, limit=1, system_instruction="Answer with care. " * 1500)
    assert "system instruction" in task.config.metadata["skipped"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chat", [False, True])
def test_quick_counts_are_the_models_own(kind, chat):
    """Counting with the tokenizer's core agrees with what a model encodes, special tokens included."""
    if chat and tokenizer(kind).chat_template is None:
        pytest.skip("no chat template")
    lm = active(kind)
    meter = meter_for({}, lm.apply_chat_template if chat else None)
    for name in ("niah", "cwe", "story_filtering"):
        draft = recipe(name).draft(4096, 0, 3, False)
        for units in (0, 7, 12):
            message = draft.message(units, "")
            prompt = lm.apply_chat_template([{"role": "user", "content": message}]) if chat else message
            lm.tokenizer(["a", "b b b"], padding="longest", truncation=True, max_length=2)  # leaves its settings behind
            assert meter.count(prompt) == lm.tokens(prompt)
    bos = lm.tokenizer.bos_token + "Text."  # a prompt that brings its BOS along gets no second one
    assert meter.count(bos) == lm.tokens(bos)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["niah", "vt", "cwe", "story_multihop"])
def test_counting_in_parts_changes_no_document(kind, name):
    lm = active(kind)
    meter = meter_for({}, None)
    for index in range(3):
        fitted = []
        for parts in (None, meter.parts):
            draft = recipe(name).draft(8192, 0, index, False)
            fitted.append(fit(draft, 8192, meter.count, Filler(meter.count), parts=parts))
        assert fitted[0] == fitted[1]
        assert lm.tokens(recipe(name).draft(8192, 0, index, False).message(fitted[0].units, fitted[0].filler)) == 8192


@pytest.mark.parametrize("name", ["niah", "vt", "story_multihop", "story_filtering"])
@pytest.mark.parametrize("limit", [8192, 8100])
def test_a_document_does_not_depend_on_how_many_are_asked_for(name, limit):
    """Where the model's limit is tight, room is kept for the longest answer: of the same documents always."""
    lm = active("bpe", max_length=limit)
    texts = set()
    for samples in (1, 7, 100, 130):
        task = build(leaf(f"forced_frontier_{name}_8k", samples=samples), lm, limit=1)
        texts.add(task.instances[0].doc["input"])
    assert len(texts) == 1
    for _, doc in task.doc_iterator(samples=[3, 129]):  # the last one is beyond those that settle the room
        for lead, more in task.recipe.requests(doc):
            assert lm.tokens(doc["input"] + lead + more) <= limit


@pytest.mark.parametrize("kind", ["bpe", "unigram", "bytes"])
@pytest.mark.parametrize("name", ["story_retrieval", "story_multihop", "story_filtering"])
def test_twins_of_stories_have_their_siblings_chapters(kind, name):
    lm = active(kind)
    one = build(leaf(f"frontier_{name}_8k"), lm, limit=6)
    twin = build(leaf(f"forced_frontier_{name}_8k"), lm, limit=6)
    for (_, doc), (_, other) in zip(one.doc_iterator(limit=6), twin.doc_iterator(limit=6), strict=True):
        assert doc["chapters"] == other["chapters"] and doc["target"] == other["target"]
        assert 0.95 * 8192 <= min(doc["tokens"], other["tokens"]) <= max(doc["tokens"], other["tokens"]) <= 8192


def test_a_twin_with_the_longer_instructions_gets_what_fits_for_both():
    class Lengthy(Blocks):
        def message(self, units, filler):
            return super().message(units, filler) + "x" * 30

    count = len
    short, long = Blocks([40], 50), Lengthy([40], 50)
    for budget in range(200, 400, 7):
        try:
            fitted = [fit_both(a, b, budget, count, Filler(count)) for a, b in ((short, long), (long, short))]
        except DoesNotFit:
            continue
        assert fitted[0].units == fitted[1].units and max(one.tokens for one in fitted) <= budget


# ----------------------------------------------------------------------------------------- where the tokenizer is from


def test_the_model_that_rendered_the_template_counts_before_the_active_one():
    active("bytes")
    other = StandIn("digits")
    task = build(leaf(), other, chat=True, limit=1)
    assert other.tokens(task.instances[0].args[0]) == 4096


def test_an_active_model_of_another_name_does_not_count(tmp_path):
    lm = active("bytes")
    lm.pretrained = "some/model"
    tokenizer("digits").save_pretrained(tmp_path / "tok")
    named = build(leaf(pretrained=str(tmp_path / "tok"), max_length=8192), lm, limit=1)
    assert StandIn("digits").tokens(named.instances[0].args[0]) == 4096
    for metadata in ({}, {"pretrained": "some/model"}, {"method": "flexprefill", "sparsity": 0.9}):
        assert lm.tokens(build(leaf(**metadata), lm, limit=1).instances[0].args[0]) == 4096


def test_without_a_model_the_metadata_names_the_tokenizer(no_active_lm, tmp_path):
    tokenizer("bos").save_pretrained(tmp_path / "tok")
    for key in ("tokenizer", "pretrained", "model"):
        task = leaf(**{key: str(tmp_path / "tok"), "max_length": 5000, "method": "x", "sparsity": 0.9})
        task.build_all_requests(limit=1)
        assert StandIn("bos").tokens(task.instances[0].args[0]) == 4096
    count = meter_for({"tokenizer": str(tmp_path / "tok")}, None).count
    assert count("<s>One line.") == count("One line.") == StandIn("bos").tokens("One line.")
    without_bos = leaf(tokenizer=str(tmp_path / "tok"), add_bos_token=False)
    without_bos.build_all_requests(limit=1)
    assert StandIn("bos").tokens(without_bos.instances[0].args[0]) == 4097


def test_limits_from_names(no_active_lm, tmp_path):
    from transformers import LlamaConfig

    tokenizer("digits").save_pretrained(tmp_path)
    LlamaConfig(max_position_embeddings=6000).save_pretrained(tmp_path)
    path = str(tmp_path)

    def limit(**metadata):
        return meter_for(metadata, None).limit

    assert limit(pretrained=path) == 6000
    assert limit(pretrained=path, max_length=4000) == 4000
    assert limit(pretrained=path, max_model_len="3000") == 3000
    assert limit(tokenizer=path) is None
    assert limit(model="x", tokenizer=path, base_url="http://localhost") == 2047  # what lm-eval cuts prompts to
    assert limit(model="x", tokenizer=path, base_url="http://localhost", max_length=4500) == 4499


def test_no_tokenizer_is_one_clear_line(no_active_lm, tmp_path):
    for metadata in ({}, {"tokenizer": str(tmp_path / "nowhere")}):
        with pytest.raises(UserError, match="--metadata") as caught:
            leaf(**metadata).build_all_requests(limit=1)
        assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------------------------ identity


def test_the_tokenizer_hash_is_of_content(tmp_path):
    one = tokenizer("digits")
    before = tokenizer_hash(one)
    one.save_pretrained(tmp_path)
    loaded = type(one).from_pretrained(tmp_path)
    assert tokenizer_hash(loaded) == before
    again = type(one).from_pretrained(tmp_path)
    again(["a", "some longer text"], padding="longest", truncation=True, max_length=16)  # leaves its settings behind
    assert tokenizer_hash(again) == before
    grown = type(one).from_pretrained(tmp_path)
    grown.add_tokens(["one-more-token"])
    hashes = {before, tokenizer_hash(grown), *(tokenizer_hash(tokenizer(kind)) for kind in KINDS)}
    assert len(hashes) == 1 + len(KINDS)


def test_slow_tokenizers_hash_their_vocabulary():
    class Slow:
        special_tokens_map = {"eos_token": "</s>"}

        def __init__(self, vocab):
            self.vocab = vocab

        def get_vocab(self):
            return dict(random.Random(len(self.vocab)).sample(list(self.vocab.items()), len(self.vocab)))

    one, same, other = Slow({"a": 0, "b": 1}), Slow({"b": 1, "a": 0}), Slow({"a": 1, "b": 0})
    assert tokenizer_hash(one) == tokenizer_hash(same) != tokenizer_hash(other)
