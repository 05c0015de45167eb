"""Secrets under several names and in several shapes: they stand nowhere afterwards."""

from __future__ import annotations

from . import EITHER, LEGAL, REFUSED, Row, Verdict, evaluate

AREA = "secrets"
#: Known by its shape wherever it stands, and known by the name it is given under alone.
SHAPE = "hf_qWeRtYuIoPaSdFgHjKlZxCvBnM12345678"
WORD = "correct-horse-battery-9"
_M = "pretrained=<llama>"
_ONE = ("--limit", "1", "--log_samples")
_GIVEN = "model: sparse-hf\ninclude_path: <tasks>\noutput_path: out\nlimit: 1\ntasks: [tiny_choice]\n"


def _row(name: str, argv: tuple[str, ...], verdict: Verdict = LEGAL, secret: str = SHAPE, **more: object) -> Row:
    return Row(AREA, name, argv, verdict, secret=secret, **more)  # type: ignore[arg-type]


ROWS: list[Row] = [
    _row("token", evaluate(f"{_M},token={SHAPE}", *_ONE)),
    _row("token of no shape", evaluate(f"{_M},token={WORD}", *_ONE), secret=WORD),
    _row("token in JSON", evaluate(f'{{"pretrained": "<llama>", "token": "{SHAPE}"}}', *_ONE)),
    _row("token, figures in full", evaluate(f"{_M},stats=full,token={WORD}", *_ONE), secret=WORD),
    _row("token, a response cache", evaluate(f"{_M},token={WORD}", *_ONE, "--use_cache", "answers"), secret=WORD),
    _row("token, debugging", evaluate(f"{_M},token={WORD}", *_ONE, "--verbosity", "DEBUG"), secret=WORD),
    _row("token, debugging by the environment", evaluate(f"{_M},token={WORD}", *_ONE), secret=WORD,
         env={"LMEVAL_LOG_LEVEL": "DEBUG"}),
    _row("token, configuration shown", evaluate(f"{_M},token={WORD}", *_ONE, "--show_config"), secret=WORD),
    _row("token, prompts written out", evaluate(f"{_M},token={WORD}", *_ONE, "--write_out"), secret=WORD),
    _row("token twice", evaluate(f"{_M},token={WORD},token={SHAPE}", *_ONE), secret=WORD),
    _row("metadata", evaluate(_M, *_ONE, "--metadata", f'{{"token": "{SHAPE}"}}')),
    _row("metadata of no shape", evaluate(_M, *_ONE, "--metadata", f'{{"api_key": "{WORD}"}}'), secret=WORD),
    _row("metadata within", evaluate(_M, *_ONE, "--metadata", f'{{"a": {{"password": "{WORD}"}}}}'), secret=WORD),
    _row("metadata in a list", evaluate(_M, *_ONE, "--metadata", f'{{"a": [{{"secret": "{WORD}"}}]}}'), secret=WORD),
    _row("metadata as words", evaluate(_M, *_ONE, "--metadata", f"hf_token={WORD}"), secret=WORD),
    _row("metadata, a shape under another name", evaluate(_M, *_ONE, "--metadata", f"note={SHAPE}")),
    _row("metadata torn", evaluate(_M, *_ONE, "--metadata", f'{{"token": "{SHAPE}"'), REFUSED),
    _row("metadata of show", ("show", "frontier_niah_4k", "--index", "0", "--tokenizer", "<llama>", "--metadata",
                              f'{{"token": "{WORD}"}}'), EITHER, WORD, proof="says document"),
    _row("metadata of show torn", ("show", "frontier_niah_4k", "--index", "0", "--metadata", f'{{"token": "{SHAPE}"'),
         REFUSED),
    _row("metadata of check-task torn", ("check-task", "niah", "--metadata", f'{{"token": "{SHAPE}"'), REFUSED),
    _row("metadata of show torn, of no shape", ("show", "frontier_niah_4k", "--index", "0", "--metadata",
                                                f'{{"token": "{WORD}"'), REFUSED, WORD),
    _row("a token of the environment", evaluate(_M, *_ONE), env={"HF_TOKEN": SHAPE}),
    _row("a key of the environment", evaluate(_M, *_ONE, "--show_config"), secret=WORD, env={"OPENAI_API_KEY": WORD}),
    *(
        _row(f"a slip: {name}", evaluate(f"{_M},{name}={WORD}"), REFUSED, WORD)
        for name in ("tokn", "tokne", "Token", "TOKEN", "toke", "hf-token", "pasword", "api-key", "apikey", "secrt")
    ),
    *(
        _row(f"a shape under {name}", evaluate(f"{_M},{name}={SHAPE}"), REFUSED)
        for name in ("dtype", "tokenizer", "peft", "delta", "nosuch", "device_map", "max_length", "method", "backend")
    ),
    _row("a shape as a name", evaluate(f"{_M},{SHAPE}=5"), REFUSED),
    _row("a shape as the model", evaluate(f"pretrained={SHAPE}"), REFUSED),
    _row("a shape as revision", evaluate(f"{_M},revision={SHAPE}", *_ONE), EITHER),
    _row("another mistake beside it", evaluate(f"{_M},token={WORD},dtype=float17"), REFUSED, WORD),
    _row("an unknown name beside it", evaluate(f"{_M},token={WORD},nosuch=1"), REFUSED, WORD),
    _row("no equals sign", evaluate(f"{_M},token {SHAPE}"), REFUSED),
    _row("a colon", evaluate(f"{_M},token:{SHAPE}"), REFUSED),
    _row("JSON torn", evaluate(f'{{"pretrained": "<llama>", "token": "{SHAPE}"'), REFUSED),
    _row("JSON torn, of no shape", evaluate(f'{{"pretrained": "<llama>", "token": "{WORD}"'), REFUSED, WORD),
    _row("a password in a URL", evaluate(f"pretrained=https://me:{WORD}@example.org/m"), REFUSED, WORD),
    _row("a password in a tokenizer's URL", evaluate(f"{_M},tokenizer=https://me:{WORD}@example.org/m"), REFUSED, WORD),
    _row("a token in a URL", evaluate(f"pretrained=https://example.org/m?token={WORD}"), REFUSED, WORD),
    _row("generation", evaluate(_M, "--gen_kwargs", f"token={WORD}", task="tiny_generate"), REFUSED, WORD),
    _row("generation, a shape", evaluate(_M, "--gen_kwargs", f"temperature={SHAPE}", task="tiny_generate"), REFUSED),
    _row("an option that is none", (*evaluate(_M), "--token", SHAPE), REFUSED),
    _row("an option with a value that is none", (*evaluate(_M), f"--token={SHAPE}"), REFUSED),
    _row("a command", (SHAPE,), REFUSED),
    _row("a task", evaluate(_M, task=SHAPE), REFUSED),
    _row("a limit", evaluate(_M, "--limit", SHAPE), REFUSED),
    _row("a device", evaluate(_M, "--device", SHAPE), REFUSED),
    _row("the Hub, offline", evaluate(_M, "--hf_hub_log_args",
         f"hub_results_org=a,push_results_to_hub=True,token={WORD}"), REFUSED, WORD),
    _row("the Hub, no push", evaluate(_M, *_ONE, "--hf_hub_log_args", f"hub_results_org=a,token={WORD}"), secret=WORD),
    _row("the Hub, an unknown word", evaluate(_M, "--hf_hub_log_args", f"nosuch=1,token={WORD}"), REFUSED, WORD),
    _row("the Hub, a slip", evaluate(_M, "--hf_hub_log_args", f"tokn={WORD}"), REFUSED, WORD),
    _row("a config file", ("run", "--config", "given.yaml"), secret=WORD,
         files={"given.yaml": f"{_GIVEN}model_args: {{pretrained: <llama>, token: {WORD}}}\n"}),
    _row("a config file, the Hub", ("run", "--config", "given.yaml"), secret=WORD,
         files={"given.yaml": f"{_GIVEN}model_args: {{pretrained: <llama>}}\nhf_hub_log_args: {{token: {WORD}}}\n"}),
    _row("a config file, metadata", ("run", "--config", "given.yaml"), secret=WORD,
         files={"given.yaml": f"{_GIVEN}model_args: {{pretrained: <llama>}}\nmetadata: {{token: {WORD}}}\n"}),
    _row("a config file with an unknown key", ("run", "--config", "given.yaml"), REFUSED, WORD,
         files={"given.yaml": f"{_GIVEN}model_args: {{pretrained: <llama>, token: {WORD}}}\nnosuch: 1\n"}),
    _row("a config file that is torn", ("run", "--config", "given.yaml"), REFUSED,
         files={"given.yaml": f"{_GIVEN}model_args: {{pretrained: <llama>, token: '{SHAPE}\n"}),
    _row("plot", ("plot", f"https://me:{WORD}@example.org/results.json", "--output", "p.png"), REFUSED, WORD),
    _row("chat template arguments", evaluate(
        f'{{"pretrained": "<llama>", "chat_template_args": {{"api_key": "{WORD}"}}}}', *_ONE), secret=WORD),
    _row("an endpoint with a password", evaluate("pretrained=org/nosuch"), REFUSED, WORD, alone=True, slow=True,
         env={"HF_ENDPOINT": f"http://me:{WORD}@127.0.0.1:9", "HF_HUB_OFFLINE": None}),
    _row("an endpoint with a password, a push", evaluate(_M, "--hf_hub_log_args",
         "hub_results_org=a,push_results_to_hub=True"), REFUSED, WORD, alone=True, slow=True,
         env={"HF_ENDPOINT": f"http://me:{WORD}@127.0.0.1:9", "HF_HUB_OFFLINE": None, "HF_TOKEN": SHAPE}),
]  # fmt: skip
