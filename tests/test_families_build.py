"""The tiny models of `tests/families.py` are what a comparison over all families needs them to be."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests import families

#: Model type -> the kinds of its layers: full, sliding and chunked attention, shared keys and values, latent
#: attention, linear attention, state spaces, experts, attention sinks, ALiBi, learned positions, a decoder half.
SPREAD: dict[str, list[str]] = {
    "llama": [],
    "gemma3_text": ["sliding_attention", "full_attention"],
    "gemma4": ["sliding_attention", "full_attention"] * 2,
    "llama4_text": ["chunked_attention", "full_attention"],
    "deepseek_v3": [],
    "qwen3_next": ["linear_attention", "full_attention"],
    "jamba": ["linear_attention", "full_attention"] * 2,
    "mixtral": [],
    "gpt_oss": ["sliding_attention", "full_attention"],
    "bloom": [],
    "gpt2": [],
    "bart": [],
    "mamba": ["linear_attention"] * 2,
}


def _changes(model: PreTrainedModel, position: int, length: int = 200) -> torch.Tensor:
    """Largest change of each token's logits, `[length]`, when the token at `position` changes."""
    ids = families.prompt(length)
    other = ids.clone()
    other[0, position] += 1
    return (families.logits(model, ids) - families.logits(model, other)).abs().amax(-1)[0]


@pytest.mark.parametrize("name", SPREAD)
def test_a_model_is_built_and_causal(name: str) -> None:
    model = families.build(name)
    assert type(model).__name__ == MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[name]
    assert not model.training and all(parameter.dtype == torch.float32 for parameter in model.parameters())
    assert families.kind(name) == ("encoder-decoder" if name == "bart" else "decoder")
    assert families.layer_kinds(model.config) == SPREAD[name]
    change = _changes(model, 150)
    assert change[:150].max() < 1e-4 < 1e-2 < change[150]


@pytest.mark.parametrize("name", ["bert", "big_bird", "xlnet"])
def test_an_encoder_reads_both_ways_unless_told_otherwise(name: str) -> None:
    assert families.kind(name) == "encoder"
    assert _changes(families.build(name), 150)[:150].max() > 1e-2
    options = families.as_decoder(name)
    assert options
    change = _changes(families.build(name, **options), 150)
    assert change[:150].max() < 1e-4 < 1e-2 < change[150]


@pytest.mark.parametrize("name", ["llama", "gpt_oss", "falcon_mamba"])
def test_the_same_weights_every_time_and_none_that_hide_mistakes(name: str) -> None:
    first, second = families.build(name), families.build(name)
    for (label, ours), theirs in zip(first.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(ours, theirs)
        assert ours.isfinite().all() and ours.numel() > 1 and (ours != ours.flatten()[0]).any(), label
        assert ours.dim() < 2 or ours.std() > 0.08, label


# Those of mllama lead to its text model only from the configuration of the whole.
@pytest.mark.parametrize("name", ["qwen3_5", "mllama"])
def test_a_saved_model_is_found_again(name: str, tmp_path: Path) -> None:
    model, ids = families.build(name), families.prompt()
    again = AutoModelForCausalLM.from_pretrained(families.save(name, tmp_path)).eval()
    assert type(again) is type(model)
    torch.testing.assert_close(families.logits(again, ids), families.logits(model, ids))


def _field_names(cls: type[PreTrainedConfig]) -> set[str]:
    own = {field.name for field in dataclasses.fields(cls)} | set(cls.attribute_map)
    return own.union(*(_field_names(part) for part in cls.sub_configs.values() if dataclasses.is_dataclass(part)))


def test_the_lists_name_what_exists() -> None:
    names = families.names()
    assert names == list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    assert set(families.OVERRIDES) <= set(names) and set(families.NOT_BUILDABLE) <= set(names)
    assert not set(families.OVERRIDES) & set(families.NOT_BUILDABLE)
    assert {*families.AS_DECODER, *families.READS_FORWARDS, *families.READS_BOTH_WAYS} <= set(names)
    assert {families.kind(name) for name in names} == {"decoder", "encoder", "encoder-decoder"}
    assert set(families.SIZES) <= set().union(*(_field_names(CONFIG_MAPPING[name]) for name in names))


def test_what_cannot_be_built_says_why() -> None:
    for name, reason in families.NOT_BUILDABLE.items():
        assert reason and "\n" not in reason
        with pytest.raises(families.NotBuildable, match=reason[:30]):
            families.build(name)
    with pytest.raises(families.NotBuildable, match="divisible|head|multiple"):
        families.build("gpt2", n_head=5)
