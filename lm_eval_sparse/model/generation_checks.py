"""Generation arguments, and a model's own generation configuration, that cannot be followed as `hf` follows them.

They are refused before the first prompt runs, by name and with what to type. `generation_fields` says what becomes of
each field.
"""

from __future__ import annotations

import logging
from typing import Any, NoReturn

import transformers
from transformers import GenerationConfig, PreTrainedModel

from ..errors import UserError, nearest
from ..results.files import brief
from ..values import TOKENS, is_whole
from .generation_fields import ARGUMENTS, ELSEWHERE, FIELDS, NEVER_TYPED, OBJECTS, Field
from .sampling import changed, trial, without, without_adapter

logger = logging.getLogger(__name__)


def check(model: PreTrainedModel, arguments: dict[str, Any]) -> None:
    """Raise `UserError` for arguments (normalised by lm-eval) or a configuration that cannot be followed as by `hf`."""
    model = without_adapter(model)
    if not isinstance(getattr(model, "generation_config", None), GenerationConfig):
        raise UserError(
            f"{type(model).__name__} has no generate in transformers {transformers.__version__}, so it cannot answer "
            "generated tasks: use scored ones"
        )
    _check_names(model, arguments)
    _check_typed(arguments)
    _check_tokens(model, arguments)
    _check_configured(model, arguments)
    if changed(model) is None:
        _check_trial(model, arguments)


def check_early(arguments: dict[str, Any]) -> None:
    """Raise `UserError` for what is wrong with typed generation arguments whatever the model is."""
    for name in arguments.keys() & ELSEWHERE.keys():
        _refuse_elsewhere(name, arguments[name])
    tokens = arguments.get("max_gen_toks", 1)
    if not is_whole(int(tokens) if isinstance(tokens, str) and tokens.isdecimal() else tokens, 1):
        raise UserError(
            f"--gen_kwargs max_gen_toks={brief(tokens)} is not accepted: give a whole number of at least 1, such as "
            "max_gen_toks=64"
        )
    _check_typed(arguments)


def _refuse_elsewhere(name: str, value: Any) -> NoReturn:
    raise UserError(
        f"--gen_kwargs {name}={brief(value)} is no argument of transformers' generate: type {ELSEWHERE[name]} instead"
    )


def _check_names(model: PreTrainedModel, arguments: dict[str, Any]) -> None:
    known = vars(GenerationConfig())
    for name, value in arguments.items():
        given = f"--gen_kwargs {name}={brief(value)}"
        if name in ("until", "max_gen_toks", *OBJECTS) or (name in FIELDS and not name.startswith("_")):
            continue
        if name in known and not name.startswith("_"):
            raise UserError(
                f"{given}: transformers {transformers.__version__} has it, and this release of lm-eval-sparse does not "
                f"know what it changes; leave {name} out, or use --model hf"
            )
        if name in ELSEWHERE:
            _refuse_elsewhere(name, value)
        if name in ARGUMENTS:
            raise UserError(f"{given} is not accepted: {ARGUMENTS[name]}; leave {name} out")
        try:
            model._validate_model_kwargs({name: True})  # arguments that only this model's code knows go there
        except AttributeError:
            continue
        except ValueError as error:
            accepted = ["until", "max_gen_toks"]
            accepted += [n for n, f in FIELDS.items() if f.how in ("alike", "transformers") and n != "max_new_tokens"]
            raise UserError(
                f"{given} is unknown{nearest(name, [*accepted, 'max_new_tokens'])} (accepted: {', '.join(accepted)})"
            ) from error


def _check_tokens(model: PreTrainedModel, arguments: dict[str, Any]) -> None:
    """Raise on typed tokens that the model has not: an end that never comes, a score that is not there."""
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    for name, value in arguments.items():
        if name in FIELDS and FIELDS[name].takes is TOKENS and value is not None:
            tokens = value if isinstance(value, list | tuple) else [value]
            if any(token >= vocabulary for token in tokens):
                _refuse(model, name, arguments, f"is not accepted: the model has tokens 0 to {vocabulary - 1}")


def _check_typed(arguments: dict[str, Any]) -> None:
    """Raise on typed values that are none of their field, whether it takes effect or not."""
    until = arguments.get("until") or ()
    for stop in [until] if isinstance(until, str) or not isinstance(until, list | tuple) else until:
        if not isinstance(stop, str):
            raise UserError(
                f"--gen_kwargs until={brief(arguments['until'])} is not accepted: {stop!r} is no text; give a text "
                f"or a list of texts, such as --gen_kwargs 'until=[\"{stop}\"]'"
            )
    for name in OBJECTS:
        value = arguments.get(name)
        objects = [value] if callable(value) else value if isinstance(value, list) and value else [None]
        if value is not None and not all(map(callable, objects)):
            raise UserError(
                f"--gen_kwargs {name}={brief(value)} is not accepted: it takes functions, from Python; leave it out"
            )
    for name, value in arguments.items():
        field = FIELDS.get(name)
        if field is None:
            continue
        if name in NEVER_TYPED or (field.how == "idle" and field.why and value not in (None, False, field.off)):
            raise UserError(f"--gen_kwargs {name}={brief(value)} is not accepted: {field.why}; leave {name} out")
        if value is None and field.needed:
            raise UserError(f"--gen_kwargs {name}=None is not accepted: {_wanted(name, field)}")
        if value is not None and field.takes is not None and not field.takes.good(value):
            raise UserError(f"--gen_kwargs {name}={brief(value)} is not accepted: {_wanted(name, field)}")
    if arguments.get("do_sample") is True and arguments.get("temperature", 0.0) == 0.0:
        raise UserError(
            f"--gen_kwargs do_sample=True,temperature={arguments.get('temperature', 0.0)} is not accepted: to sample "
            "takes a temperature above 0, and lm-eval takes 0 where none is typed; type one, such as temperature=1.0, "
            "or leave do_sample out"
        )


def _wanted(name: str, field: Field) -> str:
    return f"give {field.takes.words if field.takes else 'a value'}, or leave {name} out"


def _check_configured(model: PreTrainedModel, arguments: dict[str, Any]) -> None:
    """Raise on values, of the model's configuration or typed, that are refused or that nobody here knows."""
    defaults = vars(GenerationConfig())
    for name, own in vars(model.generation_config).items():
        value, field = arguments.get(name, own), FIELDS.get(name)
        if field is None:
            if name in defaults and own != defaults[name] and not name.startswith("_"):
                raise UserError(
                    f"the model's generation_config.json sets {name}={brief(own)}, which transformers "
                    f"{transformers.__version__} has and this release of lm-eval-sparse does not know: take it out "
                    "there, or use --model hf"
                )
            if name not in defaults and not name.startswith("_"):
                _warn_unknown(name, own)
            continue
        if value is None:
            continue
        if field.strict and field.takes is not None and not field.takes.good(value):
            _refuse(model, name, arguments, f"is not accepted: it has to be {field.takes.words}")
        if (field.how == "refused" or field.only) and field.asks(value):
            _refuse(model, name, arguments, f"is not accepted: {field.why}")


def _refuse(model: PreTrainedModel, name: str, arguments: dict[str, Any], why: str, cause: Any = None) -> NoReturn:
    """Say of an argument, or else of a field of the model's configuration, why it is refused, and how to be rid of it.

    What stands in the file is validated by transformers whatever is typed, so typing does not help against all of it.
    """
    if name in arguments:
        raise UserError(f"--gen_kwargs {name}={brief(arguments[name])} {why}; leave {name} out") from cause
    off = FIELDS[name].off
    # Of these, lm-eval takes what is typed for itself.
    helps = name not in (*NEVER_TYPED, "max_new_tokens") and trial(model, {**arguments, name: off}) is None
    value = brief(getattr(model.generation_config, name))
    raise UserError(
        f"{name}={value}, which the model's generation_config.json sets, {why}; "
        f"{f'type --gen_kwargs {name}={off}, or ' if helps else ''}take it out there"
    ) from cause


_warned: set[tuple[str, str]] = set()


def _warn_unknown(name: str, value: Any) -> None:
    if (name, str(value)) not in _warned:
        _warned.add((name, str(value)))
        logger.warning(
            "the model's generation_config.json sets %s=%s, which transformers %s does not know: nothing comes of it, "
            "as with hf", name, value, transformers.__version__,
        )  # fmt: skip


def _check_trial(model: PreTrainedModel, arguments: dict[str, Any]) -> None:
    """Raise on what transformers itself refuses: its validation, and what it makes of scores, tried on a CPU."""
    if (error := trial(model, arguments)) is None:
        return
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300].rstrip(".:")
    refused = f"is not accepted: {reason}"
    if not isinstance(error, UserError):
        refused = f"is not accepted by transformers ({type(error).__name__}: {reason})"
    for name in arguments:
        if name != "do_sample" and trial(model, {n: v for n, v in arguments.items() if n != name}) is None:
            _refuse(model, name, arguments, refused, error)
    own = [name for name, value in vars(model.generation_config).items() if value is not None and name in FIELDS]
    for name in sorted(own, key=lambda name: FIELDS[name].how != "mode"):
        with without(model, name):
            passes = trial(model, arguments) is None
        if passes:
            _refuse(model, name, {n: v for n, v in arguments.items() if n != name}, refused, error)
    typed = " ".join(f"{name}={brief(value)}" for name, value in arguments.items())
    raise UserError(
        f"--gen_kwargs {typed}, beside the model's generation_config.json, {refused}; leave out what is not needed"
    ) from error
