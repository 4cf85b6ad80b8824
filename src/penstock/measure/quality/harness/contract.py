"""What lm-eval needs of a server's /v1/completions to score given texts, checked by one request.

lm-eval sends token ids with `echo` and `logprobs`, asks for one token, throws the last entry away
and takes the rest for the prompt's. It checks none of this: a server that does otherwise gives
wrong scores without an error. Each finding says what would go wrong.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from penstock.errors import ConfigError

MAX_DRIFT = 0.5  # nats between two computations of one log-probability, in 8-bit formats too
Post = Callable[[dict[str, Any]], tuple[int, Any]]  # a body to a status and decoded JSON


def request(model: str, prompts: Sequence[Sequence[int]]) -> dict[str, Any]:
    """The body that lm-eval's `local-completions` sends."""
    return {
        "model": model,
        "prompt": [list(prompt) for prompt in prompts],
        "temperature": 0,
        "max_tokens": 1,
        "logprobs": 1,
        "seed": 1234,
        "echo": True,
    }


def require(post: Post, model: str, token_ids: Sequence[int]) -> None:
    """Ask for the log-probabilities of two prompts and fail on the first thing that is wrong.

    Args:
        token_ids: of some text, at least 4.

    Raises:
        ConfigError: the server does not keep the contract; lm-eval's scores would be wrong.
    """
    findings = check(post, model, token_ids)
    if findings:
        raise ConfigError(
            f"The server's /v1/completions cannot score texts for lm-eval: {findings[0]}.",
            hint="use generative tasks, or a server with `echo` and `logprobs` of prompts",
        )


def check(post: Post, model: str, token_ids: Sequence[int]) -> list[str]:
    """What is wrong, each as a clause; empty: nothing was found."""
    prompts = [list(token_ids), list(token_ids[:-2])]
    status, answer = post(request(model, prompts))
    if status != 200:
        return [f"a batch of token ids with `echo` and `logprobs` is answered with HTTP {status}"]
    choices = answer.get("choices") if isinstance(answer, Mapping) else None
    if not isinstance(choices, list) or sorted(_index(c) for c in choices) != [0, 1]:
        return ["two prompts do not give two choices with the indices 0 and 1"]
    choices.sort(key=_index)
    findings: list[str] = []
    for choice, prompt in zip(choices, prompts, strict=True):
        findings += _check_choice(choice, len(prompt))
    return findings or _check_agreement(*choices)


def _index(choice: Any) -> int:
    found = choice.get("index", -1) if isinstance(choice, Mapping) else -1
    return found if isinstance(found, int) else -1


def _check_choice(choice: Mapping[str, Any], num_prompt: int) -> list[str]:
    logprobs = choice.get("logprobs")
    if not isinstance(logprobs, Mapping):
        return ["the choices have no `logprobs`"]
    lists = [logprobs.get(name) for name in ("token_logprobs", "top_logprobs")]
    if not all(isinstance(one, list) for one in lists):
        return ["`logprobs` has no lists `token_logprobs` and `top_logprobs`"]
    token_logprobs, tops = lists
    assert token_logprobs is not None
    assert tops is not None
    if len(token_logprobs) == 1:
        return ["only the generated token is reported: every text would get the score 0"]
    for name, found in (("token_logprobs", token_logprobs), ("top_logprobs", tops)):
        if len(found) != num_prompt + 1:
            return [
                f"`{name}` has {len(found)} entries for {num_prompt} prompt tokens and one "
                "generated: each text would be scored shifted"
            ]
    if not all(_is_logprob(value) for value in token_logprobs[1:]):
        return ["`token_logprobs` holds what is no log-probability behind the first token"]
    if not all(isinstance(top, Mapping) and top for top in tops[1:]):
        return ["`top_logprobs` is empty at a token: whether it is the likeliest is unknown"]
    if any(max(t.values()) < v for t, v in zip(tops[1:], token_logprobs[1:], strict=True)):
        return ["a token is likelier than the likeliest of `top_logprobs`: no text would be greedy"]
    if max(tops[-1].values()) != token_logprobs[-1]:
        return [
            "the generated token, which is the likeliest, has another number in `top_logprobs`: "
            "no text would count as greedy"
        ]
    return []


def _is_logprob(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value) and value <= 1e-6


def _check_agreement(whole: Mapping[str, Any], part: Mapping[str, Any]) -> list[str]:
    """A log-probability depends on what is before it only, so the shorter prompt's are known."""
    longer = whole["logprobs"]["token_logprobs"]
    shorter = part["logprobs"]["token_logprobs"][1:-1]
    drift = max(abs(a - b) for a, b in zip(longer[1:], shorter, strict=False))
    if drift > MAX_DRIFT:
        return [f"the same token in the same place differs by {drift:.2g} nats between two prompts"]
    return []
