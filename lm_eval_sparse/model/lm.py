"""`sparse-hf`: lm-eval's Hugging Face model with sparse attention and measured sparsity.

What lm-eval calls is here; `scoring` and `generation` answer its requests, `report` says what was measured.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import torch
import transformers
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.utils import simple_parse_args_string

from .. import __version__
from ..errors import UserError, install_excepthook
from ..methods.plan import SparseConfig, parse, split
from ..protocol import set_active_lm
from ..runtime.interface import IMPLEMENTATION, register
from ..runtime.session import Runtime
from . import adapters, arguments, contents, embedded, kept, parallel, response_cache
from .checks import (
    check_backend,
    check_batch_size,
    check_device,
    check_kernel_folder,
    check_known,
    check_template,
    refuse_attention_choice,
)
from .decoding import Decoding
from .forward import Forward
from .generation import Generator
from .lengths import Lengths
from .load import (
    Whole,
    check_attention,
    check_causal,
    check_loaded,
    check_path,
    check_pretrained,
    explained,
    first_line,
    interface_known,
    our_attention,
)
from .progress import Clock
from .report import Reporter, versions
from .resume import SampleLog, digest
from .scoring import Scorer
from .summary import Summary

logger = logging.getLogger(__name__)

register()
install_excepthook()

#: lm-eval itself warns about a missing chat template when one of these occurs in the model arguments.
INSTRUCT_WORDS = ("inst", "chat")


class SparseHFLM(HFLM):
    """lm-eval model type `sparse-hf`.

    Takes every argument of lm-eval's `hf`, and:

    Args:
        method: a name from `lm-eval-sparse methods`; `dense` by default.
            One per phase, joined by `+`: `flexprefill+snapkv+quest`.
        sparsity: share to skip in every phase with a method, in [0, 1); met to within 0.01 from 4096 tokens on.
        prefill_sparsity, kv_sparsity, decode_sparsity: the same for one phase.
        preset: `paper` takes the knobs for `sparsity` from the tables of The Sparse Frontier.
        backend: kernel of the sparse calls: `auto`, `fa4`, `hopper`, `triton`, `flex`, `gather` or `naive`.
        stats: `full` keeps the figures of every layer and head, too.
        diagnose: so many samples, the first of the run, are looked at layer by layer: what the methods lose there
            against dense attention stands in the results.
        debug: `True` checks what methods select at once on a GPU, too, which is slower: mistakes show where they are
            made. Without it they show when a batch is done.
        resume: `0` answers all anew and keeps no log. Without it, a run whose results are saved goes on from the
            answers of runs before it that have the same configuration, whatever their limit, batch size, ranks and
            device were.
        gamma, tau, ...: native knobs of the methods, instead of a sparsity.
        pretrained: as in `hf`; without it the embedded SmolLM2-135M-Instruct is used.

    Raises:
        UserError: an argument that cannot work; see its message.
    """

    def __init__(self, pretrained: str | transformers.PreTrainedModel | None = None, **kwargs: Any) -> None:
        self.lm_eval_warns = False
        self.clock = Clock()
        ours, rest = split(kwargs)
        check_pretrained(pretrained)
        refuse_attention_choice(rest)
        arguments.check_all(rest)
        adapters.check_given(rest, in_memory=pretrained is not None and not isinstance(pretrained, str))
        self.sparse: SparseConfig = parse(ours)
        self.runtime = Runtime(self.sparse.plan)
        self.forward, self.lengths = Forward(self), Lengths(self)
        self.scorer, self.generator, self.decoding = Scorer(self), Generator(self), Decoding(self)
        self.reporter = Reporter(self, full=self.sparse.stats == "full")
        self.summary = Summary(self)
        #: Where answers are taken from and kept, while lm-eval evaluates with a place for its results.
        self.sample_log: SampleLog | None = None
        #: Fields of the model's own configuration among the arguments.
        self._typed: dict[str, Any] = {}
        self.model_label = pretrained if isinstance(pretrained, str) else getattr(pretrained, "name_or_path", None)
        self.is_embedded = pretrained is None or embedded.is_embedded(pretrained)
        if self.is_embedded:
            self.model_label = embedded.NAME
            check_known(rest, None)
            if rest.get("gguf_file") is not None:
                raise UserError(f"gguf_file={rest['gguf_file']} needs pretrained=: give the folder that holds the file")
            pretrained = str(embedded.ensure())
        elif isinstance(pretrained, str):
            pretrained = check_path(pretrained, rest.get("gguf_file"), rest.get("subfolder"))
            self._typed = check_known(rest, (pretrained, rest))
        else:
            check_known(rest, None)
        if rest.get("device") is None:
            rest["device"] = "cuda" if torch.cuda.is_available() else "cpu"
        check_device(rest)
        check_kernel_folder(str(rest["device"]))
        check_backend(self.sparse.backend, str(rest["device"]))
        check_batch_size(rest)
        #: The other processes of this evaluation, or None.
        self.peers = parallel.join(rest, alone=not isinstance(pretrained, str))

        self.templated = False
        self.warned_about_template = False
        self.model_args = rest
        # lm-eval gives a model's own beside what was typed.
        passed = {name: value for name, value in rest.items() if name != "quantization_config"}
        with explained(self._named, self._typed):
            super().__init__(pretrained=pretrained, **passed)
            self.tok_encode("Text of any kind.")  # a tokenizer may load from files that are not all there
        self._take_place()
        if not isinstance(pretrained, str):
            self.model.set_attn_implementation(IMPLEMENTATION)
        check_loaded(self.model, self.max_length, self.custom_prefix_token_id)
        self.runtime.attach(self.model)
        #: Tokens `(1, L)` that the model was tried with.
        with self.clock.checking():
            self.trial = check_attention(self)
        self.lengths.check_preset()
        if self.peers is not None:
            typed = response_cache.public(ours)
            self.peers.agree({**typed, **self.fingerprint(), "device": self.device.type, **versions()})
        set_active_lm(self)
        self.clock.switch("prompts")  # lm-eval makes the documents next

    # --- construction ----------------------------------------------------------------------------------------

    @classmethod
    def create_from_arg_obj(cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None) -> Any:
        """As lm-eval's, and name the embedded model in the logged arguments when no other is given."""
        # The same words in the same place as in lm-eval's own check.
        warns = any(word in str(value).lower() for value in arg_dict.values() for word in INSTRUCT_WORDS)
        for name in arg_dict.keys() & (additional_config or {}).keys():
            if additional_config[name] is not None:
                raise UserError(
                    f"{name}={arg_dict[name]} in --model_args, and {name}={additional_config[name]} beside it: leave "
                    f"it out of --model_args and type --{name} {arg_dict[name]}"
                )
        lm = super().create_from_arg_obj({"pretrained": None, **arg_dict}, additional_config)
        lm.lm_eval_warns = warns
        if arg_dict.get("pretrained") is None:
            arg_dict["pretrained"] = embedded.NAME
        return lm

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> Any:
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @property
    def _named(self) -> str:
        """The model as messages about its files name it."""
        return f"pretrained={self.model_label!r}"

    def _get_config(self, pretrained: str, **kwargs: Any) -> None:
        with explained(self._named, self._typed):
            super()._get_config(pretrained, **kwargs)

    def _create_tokenizer(self, *args: Any, **kwargs: Any) -> None:
        own = self.model_args.get("tokenizer")
        with explained(self._named if own is None else f"tokenizer={own!r}"):
            super()._create_tokenizer(*args, **kwargs)

    def _get_backend(self, config: Any, backend: str = "default", trust_remote_code: bool | None = False) -> None:
        super()._get_backend(config, backend="default", trust_remote_code=trust_remote_code)
        check_causal(config, self.model_label, self.backend, trust_remote_code)

    def _create_model(self, pretrained: str, **kwargs: Any) -> None:
        """Load the model with our attention; image towers and the like keep their own."""
        kwargs["attn_implementation"] = our_attention(self.config)
        if (quantization := self.model_args.get("quantization_config")) is not None:
            kwargs["quantization_config"] = quantization
        with kept.loading(self, pretrained, kwargs) as there:
            if not there:
                self._load(pretrained, kwargs)

    def _load(self, pretrained: str, options: dict[str, Any]) -> None:
        with explained(self._named, self._typed):
            automatic, self.AUTO_MODEL_CLASS = self.AUTO_MODEL_CLASS, Whole(self.AUTO_MODEL_CLASS, self._typed)
            try:
                with interface_known(self.kind), adapters.loading(self, options):
                    super()._create_model(pretrained, **options)
            finally:
                self.AUTO_MODEL_CLASS = automatic

    @property
    def kind(self) -> str:
        """The model as messages name it."""
        name = f"pretrained={self.model_label!r}" if self.model_label else "the given model"
        return f"{name} ({self.config.model_type})"

    @property
    def is_recurrent(self) -> bool:
        """Whether the model carries a state that cannot be rolled back to the end of the context."""
        return bool(getattr(self.model, "_is_stateful", False))

    # --- several processes -----------------------------------------------------------------------------------

    def _take_place(self) -> None:
        """lm-eval takes the local rank for the global one, and splits documents over processes on GPUs only."""
        accelerator = getattr(self, "accelerator", None)
        if self.peers is None and accelerator is not None and accelerator.num_processes > 1:  # started by MPI
            self.peers = parallel.Peers.of(parallel.place_of(os.environ))
        self._rank, self._world_size = 0, 1
        if self.peers is not None:
            self._rank, self._world_size = self.peers.place.rank, self.peers.place.world_size

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """`(world_size, ...)`: what lm-eval asks for to let all processes have as many requests, which ours need not:
        none waits for another before the end. Told that all have as many as this one, it repeats none."""
        return tensor.expand(self.world_size, *tensor.shape) if self.peers is not None else tensor

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        """As lm-eval's; samples and metrics of tasks come in the order that they have in one process."""
        if self.peers is None:
            return [obj]
        parts = self.peers.gather(obj, dst)
        return None if parts is None else parallel.in_order(parts)

    def barrier(self) -> None:
        """lm-eval waits after each kind of request; a process may have none of a kind, and there is no need to."""

    # --- requests --------------------------------------------------------------------------------------------

    def _detect_batch_size(self, requests: Sequence | None = None, pos: int = 0) -> int:
        """lm-eval probes with five forward passes of made-up full-length prompts; they would be counted as ours."""
        return 1

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """As lm-eval's; every answer is a tuple that also carries its measured sparsity."""
        if self.enable_thinking:
            raise UserError("enable_thinking=True works with generated tasks only: leave it out for scored ones")
        self._before_requests()
        return self.scorer.loglikelihood(requests, disable_tqdm)

    def _loglikelihood_tokens(
        self, requests: list[tuple], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """lm-eval's token-level entry point: `((context, continuation), context tokens, continuation tokens)`."""
        return self.scorer.loglikelihood_tokens(requests, disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """As lm-eval's: the sum over windows of at most `max_length` tokens, each run as one prefill."""
        self._before_requests()
        return self.scorer.loglikelihood_rolling(requests, disable_tqdm)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """As lm-eval's; every text is a `str` that also carries its measured sparsity."""
        self._before_requests()
        self.scorer.side_by_side.release()
        return self.generator.generate_until(requests, disable_tqdm)

    def _before_requests(self) -> None:
        self.clock.switch("prompts")
        self.summary.begin()
        # Another SparseHFLM may have wrapped the same model in the meantime.
        self.runtime.attach(self.model)
        template = getattr(self.tokenizer, "chat_template", None)
        if template and not (self.templated or self.lm_eval_warns or self.warned_about_template):
            self.warned_about_template = True
            logger.warning(
                "%s is an instruct model (its tokenizer has a chat template), but prompts are sent without it; "
                "type --apply_chat_template to use it",
                self.model_label,
            )

    # --- what was measured -----------------------------------------------------------------------------------

    def count_restored(self, task: str, stats: dict[str, Any], window: int | None = None) -> None:
        """See `Reporter.count_restored`."""
        self.reporter.count_restored(task, stats, window)

    def report(self) -> dict[str, Any]:
        """The `sparse` block of the results file."""
        return self.reporter.report()

    def detail_report(self) -> dict[str, Any]:
        """See `Reporter.detail_report`."""
        return self.reporter.detail_report()

    def check_it_ran(self) -> None:
        """Raise when a sparse phase was requested, prompts were run, and none of its calls was sparse."""
        self.reporter.check_it_ran()

    def get_model_info(self) -> dict[str, Any]:
        """As lm-eval's, with the `sparse` block. lm-eval calls it once, after the last request."""
        self.check_it_ran()
        self.clock.switch("rest")
        info = super().get_model_info()
        if self.is_embedded:
            info["model_sha"] = embedded.GGUF_SHA256
        report = self.report()
        self.summary.show(report)
        return {**info, "sparse": report}

    # --- lm-eval's caches ------------------------------------------------------------------------------------

    def fingerprint(self) -> dict[str, Any]:
        """What decides an answer besides the prompt: `--use_cache` must not mix answers of different ones."""
        typed = {name: value for name, value in self.model_args.items() if name not in WITHOUT_EFFECT}
        return {
            **response_cache.public(typed),
            **self.sparse.describe(),
            "lm_eval_sparse": __version__,
            "pretrained": self.model_label,
            "dtype": str(self.model.dtype),
            "max_length": self.max_length,
            "weights": contents.weights(self.model),
            "tokenizer": contents.tokenizer(self.tokenizer, self.eot_token_id),
            **contents.code(self.model),
            "transformers": transformers.__version__,
        }

    def open_log(self, output: Path, tasks: Mapping[str, str]) -> None:
        """Go on from the answers that are kept beside the results in `output`, and keep new ones there.

        Args:
            tasks: by name, what decides a task's requests beside their texts, as a hash. Only these are kept.
        """
        self.close_log()
        if self.sparse.resume:
            own = {name: getattr(self.model, name, None) for name in CONFIGURATIONS}
            parts = {name: part.to_dict() for name, part in own.items() if part is not None}
            decides = {name: {k: v for k, v in part.items() if k not in IDLE_FIELDS} for name, part in parts.items()}
            configuration = {**self.fingerprint(), **{name: digest(part) for name, part in decides.items()}}
            run, about = self.reporter.run_id, self.reporter.about
            self.sample_log = SampleLog(output, configuration, run, about, tasks)
            self.reporter.runs |= self.sample_log.runs

    def close_log(self) -> None:
        """Nothing more is taken from the log of samples, or kept there."""
        if self.sample_log is not None:
            self.sample_log.close()
            self.sample_log = None

    def set_cache_hook(self, cache_hook: Any) -> None:
        """Accept a response cache only when it was written under the same configuration, or is new."""
        if (store := getattr(cache_hook, "dbdict", None)) is not None:
            response_cache.guard(store, self.fingerprint())
        super().set_cache_hook(cache_hook)

    # --- chat templates --------------------------------------------------------------------------------------

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        self.templated = True
        check_template(self.tokenizer, True)
        try:
            return super().apply_chat_template(chat_history, add_generation_prompt)
        except jinja2.TemplateError as error:
            raise UserError(
                f"the chat template of the model's tokenizer cannot be rendered ({first_line(error)}); leave "
                "--apply_chat_template out, or give another tokenizer="
            ) from error

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """As lm-eval's; it asks before the first request. Raises `UserError` where there is no such template."""
        self.templated = self.templated or bool(chat_template)
        if chat_template:
            check_template(self.tokenizer, chat_template)
        return super().chat_template(chat_template)

    @property
    def tokenizer_name(self) -> str:
        # lm-eval asks for it only when the chat template is applied.
        self.templated = True
        return super().tokenizer_name


#: Configurations of a model that decide its answers, and fields of theirs that do not.
CONFIGURATIONS = ("config", "generation_config")
IDLE_FIELDS = ("_name_or_path", "transformers_version", "_attn_implementation", "_attn_implementation_internal")

#: Model arguments that do not change an answer.
WITHOUT_EFFECT = ("device", "batch_size", "max_batch_size", "logits_cache", "parallelize", "token", "cache_dir")


__all__ = ["SparseHFLM"]
